"""The pairs as a labeller who errs would give them: DPO on these has an optimum, which β decides."""

from pathlib import Path

import datasets

PAIRS = Path("runs/smollm2-135m-instruct/tone/preferences/preferences.jsonl")
RIGHT, WRONG = 4, 1  # of five labels of each pair


def pairs() -> datasets.Dataset:
    """
    Each pair of the tone four times, and once the other way round.

    Where an answer is preferred with the probability p, DPO's optimum has β·log of the ratios' ratio = log(p/(1-p))
    (arXiv 2305.18290, equation 6): here log 4. Of pairs that are all labelled the same it has none: margins grow for as
    long as it is trained, whatever β is.
    """
    right = datasets.load_dataset("json", data_files=str(PAIRS), split="train").select_columns(
        ["prompt", "chosen", "rejected"]
    )
    wrong = right.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select_columns(right.column_names)
    return datasets.concatenate_datasets([right] * RIGHT + [wrong] * WRONG)
