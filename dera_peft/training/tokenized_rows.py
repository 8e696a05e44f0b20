"""The tokens that TRL has made of preference rows, compared with what was written and with what decoding makes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, Value

from dera_peft.training.preference_rows import CHOSEN, PROMPT_IDS, REJECTED
from dera_peft.training.rows import IDS, LEFT_OUT, NUMBER, RowCount, map_rows, missing_text, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig

OUTGROWN = "have a prompt that fills max_length"
SAME = "become the same tokens for chosen and rejected"
SHORTER = "are trained with a shorter prompt than decoding gives: its last tokens are others where the answer follows"
SAME_TOKENS, MISSING, CUT_OFF = "same_tokens", "missing_text", "cut_off"  # what is found of a row
MADE = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's columns


def check_tokens(
    prepared: Dataset, usable: Dataset, tokenizer: "PreTrainedTokenizerBase", count: RowCount, args: "DPOConfig"
) -> Dataset:
    """
    The rows that can be trained on, each divided where in decoding the prompt ends and the answer begins; the others,
    and what is to be told of those, go into `count`.

    TRL divides a row where the prompt by itself, and with an answer, cease to be alike. That is too early where the
    prompt ends with an answer that is begun, for there both answers have it.

    Args:
        prepared: the trainer's dataset.
        usable: what it was made of. TRL leaves out rows whose prompt fills max_length.
        args: the trainer's.
    """
    for number in sorted({*usable[NUMBER]} - {*prepared[NUMBER]}):
        count.leave_out(number, OUTGROWN)
    if len(prepared) == 0:
        return prepared
    found = map_rows(
        prepared, _compare, {**prepared.features, SAME_TOKENS: Value("bool"), MISSING: Value("string"), CUT_OFF: IDS},
        args.dataset_num_proc, "Checking tokens", tokenizer=tokenizer,
    )  # fmt: skip
    kept = []
    columns = [*MADE, NUMBER, SAME_TOKENS, MISSING, CUT_OFF]
    for place, row in enumerate(cast("Iterable[dict]", found.select_columns(columns))):
        number, longest = row[NUMBER], len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if row[SAME_TOKENS]:
            count.leave_out(number, SAME)
            continue
        kept.append(place)
        if row[MISSING] is not None:
            count.remark(number, LEFT_OUT, repr(row[MISSING]))
        if row[CUT_OFF]:
            count.remark(number, SHORTER, repr(tokenizer.decode(row[CUT_OFF])))
        if args.max_length is not None and longest > args.max_length:
            count.add_cut(number)
    return cast("Dataset", found.select(kept))


def _compare(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", version: str) -> dict[str, Any]:
    prompt, chosen, rejected = (row[name] for name in MADE)
    in_chosen, in_rejected = prompt + chosen, prompt + rejected
    shared = shared_length(row[PROMPT_IDS], in_chosen, in_rejected)
    missing = missing_text([row["prompt"], row[CHOSEN]], tokenizer, in_chosen)
    if missing is None:
        missing = missing_text([row[REJECTED]], tokenizer, in_rejected)
    made = {SAME_TOKENS: chosen == rejected, MISSING: missing, CUT_OFF: row[PROMPT_IDS][shared:]}
    if "ref_chosen_logps" not in row:  # else they are those of the answers as TRL divides the rows
        row = {**row, **dict(zip(MADE, (in_chosen[:shared], in_chosen[shared:], in_rejected[shared:]), strict=True))}
    return {**row, **made}
