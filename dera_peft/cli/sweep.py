"""`dera sweep`: a sweep over λ, with its table, what it recommends, and two prompts' texts."""

from collections import defaultdict
from dataclasses import dataclass

import typer

from dera_peft.cli.program import process_group
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.config import SweepConfig
from dera_peft.settings import part, setting

FAILED = 1  # the exit code where a reward or the judge failed on some rows


@dataclass(frozen=True, kw_only=True)
class SweepSettings(SweepConfig):
    """The settings of `dera sweep`."""

    check: bool = setting(
        False,
        "Only a quick look, without rewards: does the adapter respond to λ, and at which λ does text fall apart?",
        panel="Measuring",
    )


def sweep(settings: SweepSettings) -> None:
    """Find the right λ on held-out prompts: decode at several, measure, recommend one, show it.

    Run again, it goes on where it stopped; more λ, samples or rewards add to what is there. The command line comes
    before the config, and that before the defaults. It exits with 1 where a reward failed on some rows. On several
    GPUs: `torchrun --nproc_per_node N -m dera_peft.cli sweep …`.

    **Examples**

    `dera sweep --config configs/tiny/sweep.yaml`

    `dera sweep --adapter ./dpo --prompts test.txt --check`

    `dera sweep --adapter ./dpo --prompts test.jsonl --reward reward.py:reward --reward length --output-dir runs/sweep`

    `dera sweep --adapter ./dpo --prompts org/dataset --split test --reward org/reward-model --judge judge.py:judge
    --rule kl_budget --kl-budget 5 --lambda 0,0.5,1,2 --arm combine=plausible:0.1
    --arm adapter=./dpo-2,name=retrained --output-dir runs/sweep`

    `dera sweep --engine vllm --vllm-python vllm-env/bin/python --vllm-argument tensor_parallel_size=2 --adapter ./dpo
    --prompts test.jsonl --reward reward.py:reward --output-dir runs/sweep`

    `dera sweep --adapters helpful=./a --adapters harmless=./b --prompts test.jsonl --reward reward.py:both --simplex 4
    --lambda helpful=0 --lambda helpful=1.5 --output-dir runs/both`
    """
    settings.check_paths()
    config = part(settings, SweepConfig)
    if settings.check:
        from dera_peft.cli.check import check

        with process_group():
            check(config)
        return
    from rich.console import Console

    from dera_peft.cli.console import printable
    from dera_peft.cli.sweep_tables import further_columns, main_columns, show_samples, tables, tell, tell_failures
    from dera_peft.evaluate.analysis.summary import lambda_text
    from dera_peft.evaluate.run import sweep as run_sweep
    from dera_peft.progress import show_progress

    with process_group():
        result = run_sweep(config, progress=show_progress)
    if result is None:  # of several processes the first one tells
        return
    console = Console()
    arms: dict[str, list] = defaultdict(list)
    for summary in result.summaries:
        arms[summary.arm].append(summary)
    for arm, summaries in arms.items():
        if len(arms) > 1:
            console.print(printable(arm), style="bold cyan")
        for columns in (main_columns(summaries), further_columns(summaries)):
            for table in tables([lambda_text(s.lam) for s in summaries], columns, console.width):
                console.print(table)
                console.print()
    show_samples(console, [row for row in result.rows if row["arm"] == LOGITS])
    if result.curve.reason is not None:
        tell(console, f"Between the decoded λ nothing is estimated: {result.curve.reason}.")
    if result.recommendation is not None:
        tell(console, result.recommendation.text())
    if result.no_recommendation is not None:
        tell(console, f"No λ is recommended: {result.no_recommendation}")
    if result.best is not None:
        console.print()
        tell(console, result.best.text())
        if result.best.use is not None:
            tell(console, f"To decode like that: {result.best.use}")
    console.print()
    tell(console, f"written to {config.output_dir}: {', '.join(result.files)}")
    if result.failed:
        tell_failures(result)
        raise typer.Exit(FAILED)
