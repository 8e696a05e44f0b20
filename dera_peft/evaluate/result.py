"""The result of a sweep."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dera_peft.evaluate.analysis.curve import Curve
    from dera_peft.evaluate.analysis.recommend import Recommendation
    from dera_peft.evaluate.analysis.summary import LambdaSummary


@dataclass(frozen=True)
class SweepResult:
    """
    The result of a sweep.

    Attributes:
        summaries: by arm, then by ascending λ.
        curve: reward and KL between the sweep's λ.
        recommendation: None where there is none to make.
        no_recommendation: why there is none.
        command: retrains at the recommended strength; None where that is unknown.
        rows: as in samples.jsonl, by arm, prompt, λ and sample.
        reused: how many of the completions an earlier run had made.
        failed: how many rows a reward or the judge failed on.
        files: what was written into the output folder.
    """

    summaries: "list[LambdaSummary]"
    curve: "Curve"
    recommendation: "Recommendation | None"
    no_recommendation: str | None
    command: str | None
    rows: list[dict]
    reused: int
    failed: int
    files: list[str]
