"""The figures that are kept of the runs, and what is computed of them: means, paired differences, intervals."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy

from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.choice import difference_of_draws
from dera_peft.evaluate.analysis.resamples import INTERVAL, Estimate, Resamples
from dera_peft.evaluate.analysis.summary import LambdaSummary, summarise

NOT_YET = "not measured yet"
OF_ROW = ("arm", "lambda", "texts", "prompt", "sample", "tokens", "ended", "kl")  # all else of a point is a reward's


class Figures:
    """
    All points of all sweeps in a folder of `evidence.py`.

    Sweeps have the same prompts, in the same order, and the same random numbers for each, so that any two points can be
    compared prompt by prompt. They share the resamples of the prompts.
    """

    def __init__(self, folder: Path):
        self.points: dict[tuple[str, str, float | None], dict] = {}
        for file in sorted(folder.glob("*.json")):
            if file.name not in ("trainings.json", "times.json"):
                for point in json.loads(file.read_text(encoding="utf-8")):
                    self.points[file.stem, point["arm"], point["lambda"]] = point
        self.trainings = json.loads((folder / "trainings.json").read_text(encoding="utf-8"))
        times = folder / "times.json"
        self.minutes = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
        self.summaries = {}
        for sweep in dict.fromkeys(key[0] for key in self.points):
            rows = [row for key, point in self.points.items() if key[0] == sweep for row in _rows(point)]
            self.summaries.update({(sweep, s.arm, s.lam): s for s in summarise(rows)})

    def get(self, sweep: str, lam: float | None, arm: str = LOGITS) -> LambdaSummary | None:
        return self.summaries.get((sweep, arm, lam))

    def of(self, sweep: str, arm: str = LOGITS) -> list[LambdaSummary]:
        """By ascending λ."""
        return [s for (found, its, _), s in self.summaries.items() if (found, its) == (sweep, arm)]

    def length_controlled(self, sweep: str, lam: float, against: float, reward: str) -> Estimate | None:
        """
        How much more reward λ has than another one at equal length.

        The difference of each prompt is regressed on its difference in tokens; this is the line's value at none.
        """
        one, other = self.get(sweep, lam), self.get(sweep, against)
        if one is None or other is None:
            return None
        y = _by_prompt(one, reward) - _by_prompt(other, reward)
        x = self.tokens(sweep, lam) - self.tokens(sweep, against)
        counts = numpy.vstack([numpy.ones(len(y)), Resamples(len(y)).counts])  # all prompts once; then [1000, P]
        n, sx, sy = counts.sum(1), counts @ x, counts @ y
        slope = (n * (counts @ (x * y)) - sx * sy) / numpy.maximum(n * (counts @ (x * x)) - sx**2, 1e-12)
        values = (sy - slope * sx) / n
        low, high = numpy.percentile(values[1:], INTERVAL)
        return Estimate(float(values[0]), float(values[1:].std(ddof=1)), float(low), float(high), values[1:])

    def tokens(self, sweep: str, lam: float, arm: str = LOGITS) -> numpy.ndarray:
        """Mean length of a prompt's answers, `[P]`."""
        point = self.points[sweep, arm, lam]
        prompts, tokens = numpy.array(point["prompt"]), numpy.array(point["tokens"], dtype=float)
        return numpy.array([tokens[prompts == prompt].mean() for prompt in sorted(set(point["prompt"]))])

    def text(self, sweep: str, lam: float, prompt: int, arm: str = LOGITS) -> str | None:
        texts = self.points.get((sweep, arm, lam), {}).get("texts", [])
        return next((text["answer"] for text in texts if text["prompt"] == prompt), None)


def _rows(point: dict) -> list[dict]:
    """As in samples.jsonl, as far as `summarise` reads them."""
    rewards = [name for name in point if name not in OF_ROW]
    return [
        {
            "arm": point["arm"], "lambda": point["lambda"], "prompt_index": prompt, "sample": sample,
            "num_tokens": tokens, "finish_reason": "eos" if ended else "length", "kl": kl,
            "rewards": {name: point[name][place] for name in rewards},
        }
        for place, (prompt, sample, tokens, ended, kl) in enumerate(
            zip(*(point[name] for name in ("prompt", "sample", "tokens", "ended", "kl")), strict=True)
        )
    ]  # fmt: skip


def level(summary: LambdaSummary | None, reward: str) -> Estimate | None:
    return None if summary is None or reward not in summary.rewards else summary.rewards[reward].level


def difference(one: LambdaSummary | None, other: LambdaSummary | None, reward: str) -> Estimate | None:
    """One minus the other, paired over the prompts."""
    ours, theirs = level(one, reward), level(other, reward)
    return None if ours is None or theirs is None else difference_of_draws(ours, theirs)


def spread(values: Sequence[float]) -> float:
    """Between trainings: the standard deviation."""
    return float(numpy.std(values, ddof=1))


def interval(estimate: Estimate | None, form: str = "+.3f") -> str:
    if estimate is None:
        return NOT_YET
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def mean(estimate: Estimate | None, form: str = ".2f") -> str:
    return NOT_YET if estimate is None else format(estimate.mean, form)


def verdict(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if not estimate.excludes_zero:
        return "not told apart"
    return "higher" if estimate.mean > 0 else "lower"


def _by_prompt(summary: LambdaSummary, reward: str) -> numpy.ndarray:
    values = summary.rewards[reward].by_prompt
    assert values is not None  # `summarise` gives it
    return values
