"""`dera lm-eval`: benchmarks of lm-evaluation-harness by λ."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import lambdas_setting
from dera_peft.errors import DeRaError
from dera_peft.settings import part, setting


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings(ModelSource):
    """The settings of `dera lm-eval`."""

    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (0.0, 0.5, 1.0), "Strengths. Of several adapters a point is name=λ,name=λ, and there is no default.", "Sampling"
    )
    harness: tuple[str, ...] = setting(
        (), "Further arguments of the harness, which the command line also takes as they are.", metavar="ARGUMENT",
        is_rest=True,
    )  # fmt: skip


def lm_eval(settings: LmEvalSettings) -> None:
    """Run benchmarks of lm-evaluation-harness at several λ, from one load: what alignment costs, by λ.

    All further options are the harness's own, which `lm-eval run --help` lists: --tasks, --num_fewshot, --limit,
    --batch_size, --output_path, --log_samples … (of its YAML file -C alone). Below --output_path each λ has a folder of
    its own. A sweep whose output folder that is shows the results in its report when it is run again.

    **Examples**

    `dera lm-eval --adapter ./dpo --lambda 0,0.5,1,2 --tasks arc_easy,gsm8k --batch_size 16`

    `dera lm-eval --adapter ./dpo --lambda 0,1 --tasks mmlu --num_fewshot 5 --output_path runs/sweep --log_samples`
    """
    if find_spec("lm_eval") is None:
        raise DeRaError("dera lm-eval needs lm_eval, which is not installed: pip install 'dera-peft[lm-eval]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeRaError("dera lm-eval is one process; a model on several GPUs: --device-map auto, without torchrun.")
    settings.check_paths()
    _lm_eval(settings)


def _lm_eval(settings: LmEvalSettings) -> None:
    from rich.console import Console

    from dera_peft.cli.sweep_tables import tables, tell
    from dera_peft.decoding.lambdas import for_adapters
    from dera_peft.decoding.rows import RowLog
    from dera_peft.evaluate.analysis.summary import lambda_text
    from dera_peft.evaluate.benchmarks import FILE, BenchmarkRow, by_line
    from dera_peft.evaluate.harness import Harness
    from dera_peft.lock import hold

    source = part(settings, ModelSource)
    source.check_has_adapter("dera lm-eval")
    lambdas = for_adapters(settings.lambdas, source.resolve().aligned)
    harness = Harness(source, settings.harness)
    output = harness.output
    with hold(output, "--output_path", is_folder=True):
        log = None if output is None else RowLog(output / FILE, BenchmarkRow, argument="--output_path")
        rows: list[BenchmarkRow] = []
        for lam in lambdas:
            found = harness.evaluate(lam)
            rows += found
            if log is not None:
                log.append(found)
    console = Console()
    columns = [(_heading(label, line[0]), [_cell(row) for row in line]) for label, line in by_line(rows).items()]
    for table in tables([lambda_text(lam) for lam in lambdas], columns, console.width):
        console.print(table)
        console.print()
    tell(console, "± is the harness's standard error over a task's documents.")
    if output is not None:
        tell(console, f"written to {output}: {FILE}, and a folder for each λ")


def _heading(label: str, row: Any) -> str:
    return label if row.higher_is_better is None else f"{label} {'↑' if row.higher_is_better else '↓'}"


def _cell(row: Any) -> str:
    value = "–" if row.value is None else f"{row.value:.4f}"
    return value if row.stderr is None else f"{value} ± {row.stderr:.4f}"
