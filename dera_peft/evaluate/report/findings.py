"""What a sweep found, as its plots and its page show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.engine.names import LOGITS, WEIGHTS
from dera_peft.evaluate.analysis.best import BestArm
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.recommend import Recommendation
from dera_peft.evaluate.analysis.summary import LambdaSummary
from dera_peft.evaluate.benchmarks import BenchmarkRow
from dera_peft.evaluate.points import is_of_several
from dera_peft.evaluate.report.scales import near_range

SHORT = 44  # letters of an adapter's name in a plot


@dataclass(frozen=True)
class Findings:
    """
    Attributes:
        summaries: one per arm and λ.
        curve: what was estimated between the measured λ of DeRa; None where there is nothing.
        recommendation: None where there is none to make.
        reason: why not.
        best: of all arms, if there are several.
        adapter: how the user names what λ is the strength of.
        models: the arms of other adapters: the λ that their λ=1 stands for, or None where that isn't known; those are
            not drawn where λ is the axis.
        ways: by arm, what differs from plain λ.
        benchmarks: label -> what a benchmark gave at each λ, as of `benchmarks.by_line`.
    """

    summaries: Sequence[LambdaSummary]
    curve: Curve | None = None
    recommendation: Recommendation | None = None
    reason: str | None = None
    best: BestArm | None = None
    adapter: str = "the adapter"
    models: Mapping[str, float | None] = field(default_factory=dict)
    ways: Mapping[str, str] = field(default_factory=dict)
    benchmarks: Mapping[str, Sequence[BenchmarkRow]] = field(default_factory=dict)

    @cached_property
    def arms(self) -> dict[str, list[LambdaSummary]]:
        arms: dict[str, list[LambdaSummary]] = {}
        for summary in self.summaries:
            arms.setdefault(summary.arm, []).append(summary)
        return arms

    @cached_property
    def rewards(self) -> list[str]:
        """Their names; the one that λ was chosen by comes first."""
        names = list(dict.fromkeys(name for summary in self.summaries for name in summary.rewards))
        chosen = self.recommendation and self.recommendation.reward
        return sorted(names, key=lambda name: name != chosen)

    @property
    def of_several(self) -> bool:
        """Whether λ is a point of several adapters."""
        return is_of_several(summary.lam for summary in self.summaries)

    @property
    def recommended(self) -> tuple[str, Lambda | None] | None:
        """Arm and λ."""
        if self.best is not None:
            return self.best.best.arm, self.best.best.lam
        return None if self.recommendation is None else (LOGITS, self.recommendation.lam)

    def name_of(self, arm: str) -> str:
        return {LOGITS: f"{self.short} (DeRa)", WEIGHTS: f"{self.short}, its weights scaled by λ"}.get(arm, arm)

    @property
    def short(self) -> str:
        """The adapter's name with as many of its last folders as a plot has room for."""
        if len(self.adapter) <= SHORT:
            return self.adapter
        parts = self.adapter.rstrip("/").split("/")
        kept = parts[-1]
        for part in reversed(parts[:-1]):
            if len(part) + len(kept) >= SHORT:
                break
            kept = f"{part}/{kept}"
        return f"…{kept[-SHORT:]}" if len(kept) > SHORT else f"…/{kept}"

    def place_of(self, arm: str, lam: Lambda | None) -> float | None:
        """Where λ of an arm stands on the axis of λ; None where it has no place there."""
        scale = self.models.get(arm, 1.0)
        return None if lam is None or isinstance(lam, NamedLambda) or scale is None else lam * scale

    def is_far(self, arm: str, lam: Lambda | None) -> bool:
        """Whether λ is far from the others, so that what it gives may be too."""
        values = values_of(lam) if isinstance(lam, NamedLambda) else [self.place_of(arm, lam)]
        ranges = zip(values, self._near, strict=True)
        return any(value is not None and not low <= value <= high for value, (low, high) in ranges)

    @cached_property
    def _near(self) -> list[tuple[float, float]]:
        named = [values_of(summary.lam) for summary in self.summaries if isinstance(summary.lam, NamedLambda)]
        if named:
            return [near_range(values) for values in zip(*named, strict=True)]
        places = [self.place_of(summary.arm, summary.lam) for summary in self.summaries]
        return [near_range(place for place in places if place is not None)]
