"""The curve between the decoded λ on real text: 48 tokens of a small language model, with a strong adapter."""

import math

import numpy
import pytest
import torch
from tiny_models import make_adapter
from transformers import AutoTokenizer

from dera_peft import DeRaModel
from dera_peft.decoding.scoring import score
from dera_peft.evaluate.analysis.curve import MIN_SHARE, estimate_curve

SAMPLES, TOKENS = 60, 48
MEASURED, HELD_OUT = [0.0, 0.25, 0.5, 0.75, 1.0], 0.625
GRID = sorted([*MEASURED, HELD_OUT])


@pytest.fixture(scope="module")
def rows(stories, tmp_path_factory) -> dict[float, list[dict]]:
    """λ -> samples scored on the grid, of one prompt that counts as a prompt of its own each time it is decoded."""
    adapter = make_adapter(stories, tmp_path_factory.mktemp("strong"), scale=0.7)
    model = DeRaModel.from_pretrained(stories, adapter)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    texts = model.generate(
        prompt.repeat(len(GRID), 1), attention_mask=torch.ones(len(GRID), prompt.shape[1], dtype=torch.long), lam=GRID,
        do_sample=True, top_k=0, max_new_tokens=TOKENS, num_return_sequences=SAMPLES, pad_token_id=0,
    )[:, prompt.shape[1] :].tolist()  # fmt: skip
    completions = []
    for text in texts:
        end = text.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in text else TOKENS
        completions.append(text[:end])
    found: dict[float, list[dict]] = {lam: [] for lam in GRID}
    for number, scored in enumerate(score(model, prompt.tolist() * len(completions), completions, GRID)):
        kl = scored.kl.sum(-1).tolist()
        lam = GRID[number // SAMPLES]
        row = {
            "arm": "logits", "lambda": lam, "prompt_index": number % SAMPLES, "sample": 0,
            "log_p": scored.total.tolist(), "kl_grid": kl, "kl": kl[GRID.index(lam)],
            "rewards": {"distinct": len(set(completions[number])) / len(completions[number])},
        }  # fmt: skip
        found[lam].append(row)
    return found


def test_a_grid_of_quarters_carries_the_curve_and_one_of_halves_does_not(rows):
    assert numpy.mean([row["kl"] for row in rows[1.0]]) > 50, "a strong adapter"
    curve = estimate_curve([row for lam in MEASURED for row in rows[lam]], GRID, ["distinct"])
    assert curve.gaps == []
    for point in curve.points:
        assert point.drawn
        assert point.ess >= MIN_SHARE * SAMPLES
    point = curve.points[GRID.index(HELD_OUT)]
    for estimate, direct in (
        (point.kl, [row["kl"] for row in rows[HELD_OUT]]),
        (point.rewards["distinct"], [row["rewards"]["distinct"] for row in rows[HELD_OUT]]),
    ):
        error = math.hypot(estimate.se, numpy.std(direct, ddof=1) / math.sqrt(SAMPLES))
        assert abs(estimate.mean - numpy.mean(direct)) < 3 * error

    halves = estimate_curve([row for lam in (0.0, 0.5, 1.0) for row in rows[lam]], GRID, ["distinct"])
    assert [point.lam for point in halves.points if point.drawn] == [0.0, 0.5, 1.0]
    assert halves.points[GRID.index(0.75)].ess < 0.2 * SAMPLES
    assert halves.points[GRID.index(0.75)].kl is None
    assert (halves.gaps[-1].low, halves.gaps[-1].high, halves.gaps[-1].lam) == (0.5, 1.0, 0.75)
