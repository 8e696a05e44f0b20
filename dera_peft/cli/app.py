"""The `dera` command."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from dera_peft.cli import export, generate, info, score, sweep
from dera_peft.cli.options import command
from dera_peft.errors import DeRaError
from dera_peft.messages import messages_on_stderr

INTERRUPTED = 130  # the exit code that Typer makes of Ctrl-C, as shells do: 128 + SIGINT
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
command(app, sweep.SweepSettings)(sweep.sweep)

Base = Annotated[str | None, typer.Option(metavar="MODEL", help="Base model.", rich_help_panel="Model")]
Adapter = Annotated[str | None, typer.Option(metavar="LORA", help="LoRA adapter.", rich_help_panel="Model")]
Quantization = Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(metavar="KIND", rich_help_panel="Model")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(rich_help_panel="Model")]
MODEL, OUTPUT = "Model", "Output"

bench_app = typer.Typer(rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(bench_app, name="bench")
MEASURED = "What is measured"

Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="llama-8b, llama-1b, qwen3-0.6b or smollm2-135m, in place of --base and --adapter: random weights of this "
        "shape and a random LoRA of rank 16 on all linear layers. Nothing is downloaded.",
        rich_help_panel=MEASURED,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu or cuda:0; the accelerator by default.", rich_help_panel=MODEL),
]
Layers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Give the --shape so many layers.", rich_help_panel=MEASURED),
]
Top = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="The share of the --shape's layers, from the top, that the adapter is on; 0.5 is the upper half.",
        rich_help_panel=MEASURED,
    ),
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads on a CPU; torch's own choice.")]
Rounds = Annotated[int, typer.Option(metavar="N", min=1, help="Measured rounds.")]


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device: Device = None,
    shape: Shape = None,
    layers: Layers = None,
    top: Top = 1.0,
    batch: Annotated[str, typer.Option(metavar="B[,B…]", help="Batch sizes, with commas.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", min=1, help="Decoding steps.")] = 64,
    rounds: Rounds = 5,
    only: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Measure this contender, named as in the table; repeatable."),
    ] = [],  # noqa: B006
    engine: Annotated[
        Literal["dynamic", "static"],
        typer.Option(
            help="dynamic: eager, a growing cache. static: a static cache and a compiled step (CUDA graphs on a GPU), "
            "for those that are one pass of a plain model or of DeRa."
        ),
    ] = "dynamic",
    prefill_chunk: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prefill so many tokens at once.")
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Also measure each contender's peak memory on a CPU, each in a process of its own."
        ),
    ] = False,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.", rich_help_panel=OUTPUT)] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A bar chart: .png, .svg or .pdf.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Measure what a decoding step costs: the base alone, DeRa, and the other ways to mix two models.

    All decode the same forced tokens over the same weights, in interleaved rounds after a warm-up; shown are medians
    and quartiles. Ctrl-C shows what was measured so far.

    **Examples**

    `dera bench --base org/base --adapter ./dpo --quantization nf4 --batch 1,8`

    `dera bench --shape smollm2-135m --dtype float32 --threads 2 --plot bench.png`

    `dera bench sweep --shape smollm2-135m`
    """
    if context.invoked_subcommand is not None:
        return
    from dera_peft.bench.shapes import Source
    from dera_peft.cli.bench import bench as run
    from dera_peft.cli.bench import read_batches

    source = Source(
        shape=shape,
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device=device,
        context=prompt + new,
        top=top,
        layers=layers,
    )
    interrupted = run(
        source,
        read_batches(batch),
        prompt,
        new,
        rounds,
        only,
        engine,
        prefill_chunk,
        memory,
        threads,
        as_json=json,
        plot_file=plot,
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@bench_app.command("sweep")
def bench_sweep(
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device: Device = None,
    shape: Shape = None,
    layers: Layers = None,
    lambdas: Annotated[str, typer.Option("--lambda", metavar="λ[,λ…]", help="Strengths.")] = "0,0.5,1,1.5,2",
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Completions per prompt and λ.")] = 4,
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Random prompts.")] = 8,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens of each completion.")] = 32,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Completions decoded at once, by both.")] = 8,
    rounds: Rounds = 1,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a whole sweep over λ against separate calls of `generate` for each λ and sample."""
    from dera_peft.bench.shapes import Source
    from dera_peft.cli.bench import bench_sweep as run
    from dera_peft.decoding.lambdas import read_lambdas

    source = Source(
        shape=shape,
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device=device,
        context=prompt + new,
        layers=layers,
    )
    if run(source, read_lambdas([lambdas]), samples, prompts, prompt, new, batch, rounds, threads, as_json=json):
        raise typer.Exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> None:
    """Errors that a user can mend: one line, exit code 2. Any other is a defect and shows its traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [argument for argument in given if argument != "--debug"]
    debug = len(arguments) < len(given)
    try:
        with messages_on_stderr():
            app(arguments, prog_name="dera")
    except (DeRaError, OSError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(
                "interrupted; an output file keeps what it has, and the command that writes it continues it",
                file=sys.stderr,
            )
        raise
