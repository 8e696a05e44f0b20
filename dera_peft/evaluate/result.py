"""The result of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.errors import DeRaError
from dera_peft.formatting import short_repr

if TYPE_CHECKING:
    from pandas import DataFrame

    from dera_peft.evaluate.analysis.best import BestArm
    from dera_peft.evaluate.analysis.curve import Curve
    from dera_peft.evaluate.analysis.recommend import Recommendation
    from dera_peft.evaluate.analysis.summary import LambdaSummary

SAMPLE = (
    "arm", "prompt_index", "prompt", "lambda", "sample", "completion", "num_tokens", "finish_reason", "kl",
)  # fmt: skip


@dataclass(frozen=True)
class SweepResult:
    """
    The result of a sweep.

    Attributes:
        summaries: by arm, then by ascending λ.
        curve: reward and KL between the sweep's λ.
        recommendation: of plain λ, from which β* comes; None where there is none to make.
        no_recommendation: why there is none.
        best: of all arms, by the rule of the recommendation; None where there is plain λ alone.
        command: retrains at the recommended strength; None where that is unknown.
        rows: as in samples.jsonl, by arm, prompt, λ and sample.
        reused: how many of the completions an earlier run had made.
        failed: how many rows a reward or the judge failed on.
        files: what was written into the output folder.
    """

    __repr__ = short_repr

    summaries: "list[LambdaSummary]"
    curve: "Curve"
    recommendation: "Recommendation | None"
    no_recommendation: str | None
    best: "BestArm | None"
    command: str | None
    rows: list[dict]
    reused: int
    failed: int
    files: list[str]

    def to_pandas(self) -> "DataFrame":
        """
        The samples: a row for each completion, by arm, prompt, λ and number, as in samples.jsonl; a column for each
        reward by its name, for each verdict of a judge ("judge 0", "judge 1"), and for each column of the prompts
        ("column NAME" where the name is taken). λ of several adapters is a text, with a column "lambda NAME" for each.

        Raises:
            DeRaError: pandas is not installed.
        """
        rows = []
        for row in self.rows:
            values = {name: row[name] for name in SAMPLE} | row["rewards"]
            if isinstance(lam := row["lambda"], NamedLambda):
                values |= {"lambda": f"{lam:g}"} | {f"lambda {name}": value for name, value in lam.items()}
            values |= {f"judge {lam}": verdict for lam, verdict in row.get("judged", {}).items()}
            columns = {(f"column {name}" if name in values else name): value for name, value in row["columns"].items()}
            rows.append(values | columns)
        return data_frame(rows)

    def summary_to_pandas(self) -> "DataFrame":
        """
        The means: a row for each arm and λ, with the columns of summary.csv (see `analysis.table.summary_rows`).
        Raises as `to_pandas`.
        """
        from dera_peft.evaluate.analysis.table import summary_rows

        return data_frame(summary_rows(self.summaries))


def data_frame(rows: Sequence[Mapping[str, Any]]) -> "DataFrame":
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise DeRaError("to_pandas needs pandas, which is not installed: pip install pandas.") from error
    return DataFrame(rows)
