"""What a sweep's samples say about each λ."""

import csv
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class LambdaSummary:
    """
    The means over one λ's samples. Standard errors are over prompts: samples of one prompt are not independent.

    Attributes:
        lam: λ.
        prompts, samples: how many.
        reward, reward_se: mean reward and its standard error.
        kl, kl_se: KL(π_λ ‖ π_ref) per sequence, in nats, and its standard error.
        kl_per_token: total KL over total tokens, in nats.
        tokens: mean length of a completion, in tokens.
        ended: share of the completions that the model ended itself, before the limit of tokens.
    """

    lam: float
    prompts: int
    samples: int
    reward: float
    reward_se: float
    kl: float
    kl_se: float
    kl_per_token: float
    tokens: float
    ended: float


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean (NaN for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarise(samples: Sequence[dict]) -> list[LambdaSummary]:
    """One summary per λ, ascending, from rows with the keys of `samples.jsonl`."""
    by_lam: dict[float, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        by_lam[sample["lambda"]][sample["index"]].append(sample)
    result = []
    for lam, by_prompt in sorted(by_lam.items()):
        rows = [row for group in by_prompt.values() for row in group]
        tokens = sum(row["tokens"] for row in rows)
        reward, reward_se = _over_prompts(by_prompt, "reward")
        kl, kl_se = _over_prompts(by_prompt, "kl")
        result.append(
            LambdaSummary(
                lam=lam,
                prompts=len(by_prompt),
                samples=len(rows),
                reward=reward,
                reward_se=reward_se,
                kl=kl,
                kl_se=kl_se,
                kl_per_token=math.fsum(row["kl"] for row in rows) / max(1, tokens),
                tokens=tokens / len(rows),
                ended=sum(row["finish"] == "eos" for row in rows) / len(rows),
            )
        )
    return result


def _over_prompts(by_prompt: dict[int, list[dict]], key: str) -> tuple[float, float]:
    return mean_and_se([math.fsum(row[key] for row in group) / len(group) for group in by_prompt.values()])


def write_csv(summaries: Sequence[LambdaSummary], file: str | os.PathLike) -> None:
    """One line per λ; a column for each attribute, λ's named `lambda`."""
    names = [field.name for field in fields(LambdaSummary)]
    temporary = Path(f"{file}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["lambda" if name == "lam" else name for name in names])
        for summary in summaries:
            values = asdict(summary)
            writer.writerow(
                [round(values[name], 6) if isinstance(values[name], float) else values[name] for name in names]
            )
    os.replace(temporary, file)
