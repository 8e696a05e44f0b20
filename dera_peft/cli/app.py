"""The `dera` command."""

import sys
from typing import Annotated

import typer

from dera_peft.cli import bench, chat, export, generate, info, lm_eval, push, score, serve, sweep, train
from dera_peft.cli.options import command, group
from dera_peft.cli.program import run_program, split_debug
from dera_peft.messages import messages_on_stderr

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --max_new_tokens is --max-new-tokens
}

app = typer.Typer(
    name="dera",
    help="A dial on an aligned language model: decode one base and its LoRA adapter at any strength λ. "
    "0 is the reference, 1 the model as trained, between them a weaker alignment, beyond 1 a stronger one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=CONTEXT,
)


def version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dera {version('dera-peft')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; before or after a command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


command(app, generate.GenerateSettings)(generate.generate)
command(app, score.ScoreSettings)(score.score)
command(app, info.InfoSettings)(info.info)
command(app, export.ExportSettings)(export.export)
command(app, push.PushSettings)(push.push)
command(app, sweep.SweepSettings)(sweep.sweep)
command(app, lm_eval.LmEvalSettings, "lm-eval")(lm_eval.lm_eval)
command(app, serve.ServeSettings)(serve.serve)
command(app, chat.ChatSettings)(chat.chat)
for program in (train.sft, train.preferences, train.dpo, train.distill):
    app.command(**train.PASSED_ON)(program)

bench_app = typer.Typer(rich_markup_mode="markdown", context_settings=CONTEXT)
app.add_typer(bench_app, name="bench")
group(bench_app, bench.StepSettings)(bench.bench)
command(bench_app, bench.SweepTimingSettings, "sweep")(bench.bench_sweep)
command(bench_app, bench.ServeTimingSettings, "serve")(bench.bench_serve)


def main(arguments: list[str] | None = None) -> None:
    """The `dera` command; see `run_program` for how it ends."""
    arguments, debug = split_debug(sys.argv[1:] if arguments is None else arguments)

    def program() -> None:
        with messages_on_stderr():
            app(arguments, prog_name="dera")

    run_program(program, debug)
