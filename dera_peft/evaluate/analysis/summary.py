"""What a sweep's samples say about each λ: means, errors over prompts, and differences paired prompt by prompt."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.resamples import MIN_GROUPS, Estimate, Resamples
from dera_peft.evaluate.points import anchors, ends

GUARDS = ("log_perplexity", "repetition")  # what `LambdaSummary.guards` may have


@dataclass(frozen=True)
class Paired:
    """
    One λ against another, on the same prompts and samples. λ share their random numbers, so that a difference is
    sharper than either level.

    Attributes:
        difference: of the rewards, this λ's minus the other's.
        win, tie, loss: shares of the pairs in which this λ's reward is the higher, the same, the lower; mean over
            prompts.
    """

    difference: Estimate
    win: float
    tie: float
    loss: float


@dataclass(frozen=True)
class Judged:
    """
    One λ against another, by a judge of pairs.

    Attributes:
        rate: the win rate, a tie counting as half a win; 0.5 is neither.
        win, tie, loss: shares of the pairs, mean over prompts.
        failed: pairs that the judge gave no verdict on; they are left out. Where they are as many as those that it
            decided, or more, nothing else is known: the rate would be that of equal texts, which are ties without a
            judge.
    """

    rate: Estimate
    win: float
    tie: float
    loss: float
    failed: int


@dataclass(frozen=True)
class RewardSummary:
    """
    One reward at one λ.

    Attributes:
        level: its mean.
        versus: by λ (those of `points.anchors` that the arm "logits" has: 0.0 and 1.0; of several adapters 0 for all,
            and each alone at 1), the comparison with that arm at that λ.
        groups: by the value of the column that names groups, the mean over that group's prompts.
        robust: the worst mean over reweightings of the prompts (`robust.worst_mean`), of the reward that λ is
            chosen by, where a radius is given.
        by_prompt: the mean over each prompt's samples, `[P]`; NaN for a prompt without any. All summaries of a run have
            the same prompts.
        failed: samples without a value; they are left out of all the numbers here, and of a pair both.
    """

    level: Estimate
    versus: dict[Lambda, Paired] = field(default_factory=dict)
    groups: dict[str, Estimate] = field(default_factory=dict)
    robust: Estimate | None = None
    by_prompt: numpy.ndarray | None = field(default=None, repr=False, compare=False)
    failed: int = 0

    @property
    def worst_group(self) -> str | None:
        """The group of the lowest mean; None without groups."""
        known = {name: group.mean for name, group in self.groups.items() if not math.isnan(group.mean)}
        return min(known, key=known.__getitem__, default=None)


@dataclass(frozen=True)
class LambdaSummary:
    """
    One λ of one arm.

    Attributes:
        arm: "logits" (DeRa's plain λ), or the name of another arm.
        lam: λ, of several adapters by name; None in an arm that knows none.
        prompts, samples: how many.
        kl: KL(π_λ ‖ π_ref) per sequence, in nats.
        kl_per_token: total KL over total tokens, in nats.
        tokens: mean length of a completion, in tokens.
        ended: share of the completions that the model ended itself, before the limit of tokens.
        rewards: by name.
        judged: by λ, as `RewardSummary.versus`, where there is a judge.
        guards: what tells that text breaks, as far as it was measured: "log_perplexity" (of the reference, in nats a
            token; mean over completions) and "repetition" (the share of a completion's 4-grams that it had before).
        clusters: what the bootstrap draws, as in `Resamples`.
    """

    arm: str
    lam: Lambda | None
    prompts: int
    samples: int
    kl: Estimate
    kl_per_token: float
    tokens: float
    ended: float
    rewards: dict[str, RewardSummary] = field(default_factory=dict)
    judged: dict[Lambda, Judged] = field(default_factory=dict)
    guards: dict[str, Estimate] = field(default_factory=dict)
    clusters: tuple[str, int] = ("prompts", 0)

    @property
    def perplexity(self) -> Estimate | None:
        """Under the reference, per token: the geometric mean over completions; None where it was not measured."""
        return exponential(self.guards["log_perplexity"]) if "log_perplexity" in self.guards else None


def exponential(estimate: Estimate) -> Estimate:
    """exp of what was estimated."""
    mean, low, high = (math.exp(value) for value in (estimate.mean, estimate.low, estimate.high))
    return Estimate(mean, mean * estimate.se, low, high)


def summarise(
    rows: Sequence[dict],
    group: str | None = None,
    seed: int = 0,
    radius: float | None = None,
    chosen_by: str | None = None,
) -> list[LambdaSummary]:
    """
    One summary per arm and λ: arms as they appear, each by ascending λ.

    Args:
        rows: with the keys of `samples.jsonl`, and "guards" where those were measured.
        group: a column of the prompts that names their groups.
        seed: of the bootstrap.
        radius: of the reweightings of the prompts whose worst mean is wanted, in nats.
        chosen_by: the reward that this is wanted of; the first one unless given.

    Raises:
        DeRaError: a row has no such column.
    """
    if not rows:
        return []
    positions = prompt_positions(rows)
    shape = (len(positions), 1 + max(row["sample"] for row in rows))
    by_cell: dict[tuple[str, Any], list[dict]] = defaultdict(list)
    for row in rows:
        by_cell[row["arm"], row["lambda"]].append(row)
    names = reward_names(rows)
    cells = {key: _Cell(own, names, positions, shape) for key, own in by_cell.items()}
    groups = _groups(rows, group, positions)
    resamples = resamples_of(rows, group, seed)
    of_groups = Resamples(len(positions), seed)  # a group's own mean is over its prompts
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    order = sorted(cells, key=lambda key: (arms.index(key[0]), key[1]))
    plain = [lam for arm, lam in cells if arm == LOGITS]
    against = {lam: cells[LOGITS, lam] for lam in anchors(plain)}
    judged = ends(plain[0]) if plain else []
    robust = None if radius is None else (chosen_by or names[0], radius) if names else None
    return [_summary(key, cells[key], against, judged, groups, resamples, of_groups, robust) for key in order]


def resamples_of(rows: Sequence[dict], group: str | None, seed: int) -> Resamples:
    """Of whole groups where there are enough of them, `MIN_GROUPS`; else of prompts."""
    names = {row["prompt_index"]: str(row["columns"][group]) for row in rows} if group is not None else {}
    by_place = [names[index] for index in prompt_positions(rows)] if names else []
    return Resamples(len(prompt_positions(rows)), seed, by_place if len(set(by_place)) >= MIN_GROUPS else None)


def reward_names(rows: Sequence[dict]) -> list[str]:
    """The rewards that the rows have, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row["rewards"]))


def prompt_positions(rows: Sequence[dict]) -> dict[int, int]:
    """Index of a prompt -> its place among those of all rows: what a bootstrap resamples."""
    return {index: place for place, index in enumerate(sorted({row["prompt_index"] for row in rows}))}


def _groups(rows: Sequence[dict], group: str | None, positions: dict[int, int]) -> dict[str, numpy.ndarray]:
    """Group -> which prompts are of it, `[P]` bool; in the order of their names."""
    if group is None:
        return {}
    of: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if group not in row["columns"]:
            raise DeRaError(
                f"group={group!r}: prompt {row['prompt_index']} has no such column; name a column that all prompts "
                "have."
            )
        of[str(row["columns"][group])].add(positions[row["prompt_index"]])
    return {name: numpy.isin(numpy.arange(len(positions)), list(of[name])) for name in sorted(of)}


class _Cell:
    """The rows of one arm and λ, and their rewards by prompt and sample, `[P, S]` each."""

    def __init__(self, rows: list[dict], rewards: list[str], positions: dict[int, int], shape: tuple[int, int]):
        self.rows, self.shape = rows, shape
        self.places = [positions[row["prompt_index"]] for row in rows], [row["sample"] for row in rows]
        self.failed = {name: sum(row["rewards"].get(name) is None for row in rows) for name in rewards}
        self.rewards = {name: self.table([row["rewards"].get(name) for row in rows]) for name in rewards}

    def table(self, values: list[float | None]) -> numpy.ndarray:
        """One value per row, by prompt and sample, `[P, S]`; NaN where there is none."""
        table = numpy.full(self.shape, numpy.nan)
        table[self.places] = numpy.array(values, dtype=float)
        return table


def _per_prompt(table: numpy.ndarray) -> numpy.ndarray:
    """Mean over samples, `[P]`; NaN for a prompt without any."""
    there = ~numpy.isnan(table)
    with numpy.errstate(invalid="ignore"):
        return numpy.where(there, table, 0.0).sum(1) / there.sum(1)


def _summary(
    key: tuple[str, Any],
    cell: _Cell,
    against: dict[Lambda, _Cell],
    judged: Sequence[Lambda],
    groups: dict[str, numpy.ndarray],
    resamples: Resamples,
    of_groups: Resamples,
    robust: tuple[str, float] | None,
) -> LambdaSummary:
    rows = cell.rows
    verdicts = {lam: [row.get("judged", {}).get(f"{lam:g}") for row in rows] for lam in judged}
    verdicts = {
        lam: found for lam, found in verdicts.items() if any(f"{lam:g}" in row.get("judged", {}) for row in rows)
    }
    signs: dict[Hashable, numpy.ndarray] = {}  # 1, 0, -1 by pair, [P, S]: of rewards' comparisons and of the judge's
    columns: dict[Hashable, numpy.ndarray] = {}  # all that is estimated at this λ, in one go, [P] each
    in_groups: dict[Hashable, numpy.ndarray] = {}
    columns["kl"] = _per_prompt(cell.table([row["kl"] for row in rows]))
    for name, rewards in cell.rewards.items():
        level = columns["level", name] = _per_prompt(rewards)
        for group, members in groups.items():
            in_groups["group", name, group] = numpy.where(members, level, numpy.nan)
        for lam, other in against.items():
            difference = rewards - other.rewards[name]
            columns["versus", name, lam] = _per_prompt(difference)
            signs["versus", name, lam] = numpy.sign(difference)
    for lam, found in verdicts.items():
        fails = found.count(None) > 0 and found.count(None) >= found.count(1) + found.count(-1)
        signs["judged", lam] = cell.table([None] * len(found) if fails else found)
        columns["judged", lam] = _per_prompt((signs["judged", lam] + 1) / 2)  # a win 1, a tie 1/2, a loss 0
    for pair, sign in signs.items():
        for outcome in (1, 0, -1):
            columns[pair, outcome] = _per_prompt(numpy.where(numpy.isnan(sign), numpy.nan, sign == outcome))
    for name in GUARDS:
        if any(name in row.get("guards", {}) for row in rows):
            columns["guard", name] = _per_prompt(cell.table([row["guards"].get(name) for row in rows]))
    estimates = resamples.means(columns) | (of_groups.means(in_groups) if in_groups else {})

    def shares(pair: Hashable) -> list[float]:
        return [estimates[pair, outcome].mean for outcome in (1, 0, -1)]

    tokens = sum(row["num_tokens"] for row in rows)
    return LambdaSummary(
        arm=key[0],
        lam=key[1],
        prompts=len({row["prompt_index"] for row in rows}),
        samples=len(rows),
        kl=estimates["kl"],
        kl_per_token=math.fsum(row["kl"] for row in rows) / max(1, tokens),
        tokens=tokens / len(rows),
        ended=sum(row["finish_reason"] == "eos" for row in rows) / len(rows),
        rewards={
            name: RewardSummary(
                level=estimates["level", name],
                versus={lam: Paired(estimates["versus", name, lam], *shares(("versus", name, lam))) for lam in against},
                groups={group: estimates["group", name, group] for group in groups},
                robust=resamples.worst_mean(columns["level", name], robust[1])
                if robust is not None and name == robust[0]
                else None,
                by_prompt=columns["level", name],
                failed=failed,
            )
            for name, failed in cell.failed.items()
        },
        judged={
            lam: Judged(estimates["judged", lam], *shares(("judged", lam)), failed=found.count(None))
            for lam, found in verdicts.items()
        },
        guards={name: estimates["guard", name] for name in GUARDS if ("guard", name) in estimates},
        clusters=resamples.clusters,
    )


def number(value: float, form: str = ".3f") -> str:
    """For a table or a sentence: what is unknown is "-"."""
    return "-" if math.isnan(value) else format(value, form)


def lambda_text(lam: Lambda | None) -> str:
    """For a table; "–" in an arm that knows none."""
    return "–" if lam is None else f"{lam:g}"
