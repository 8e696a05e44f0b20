"""The `dera` command."""

import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet

app = typer.Typer(
    name="dera",
    help="A dial on an aligned language model: decode one base and its LoRA adapter at any strength λ. "
    "0 is the reference, 1 the model as trained, between them a weaker alignment, beyond 1 a stronger one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130  # the exit code that Typer makes of Ctrl-C, as shells do: 128 + SIGINT
MODEL, PROMPTS, SAMPLING, OUTPUT = "Model", "Prompts", "Sampling", "Output"

Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model (the reference): hub id or folder. Not needed where a dera.json names it.",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="LORA",
        help="LoRA adapter of the aligned model: hub id or folder, in PEFT's format.",
        rich_help_panel=MODEL,
    ),
]
Quantization = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    typer.Option(
        metavar="KIND", help="nf4, fp4 or int8: load the base in 4 or 8 bits with bitsandbytes.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="DTYPE", help="float32, bfloat16 or float16; the base's own by default.", rich_help_panel=MODEL
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="As in transformers: auto, cpu, cuda:0. The accelerator by default, if there is one.",
        rich_help_panel=MODEL,
    ),
]


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


@app.command()
def generate(
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    lambdas: Annotated[
        list[str],
        typer.Option(
            "--lambda",
            metavar="λ[,λ…]",
            help="Strengths, with commas or the option repeated. By default the one that dera.json names, else 1.",
            rich_help_panel=PROMPTS,
        ),
    ] = [],  # noqa: B006 (Typer reads it, nobody changes it)
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="A prompt; can be repeated.", rich_help_panel=PROMPTS)
    ] = [],  # noqa: B006
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: .txt (one a line), .jsonl (rows with a 'prompt', a text or chat messages, and perhaps a "
            "'lambda' of their own), or path.py:function. Without any, lines are read from standard input.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Render prompts with the tokenizer's chat template.", rich_help_panel=PROMPTS),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="At most so many new tokens.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of sampling; 0 is greedy.", rich_help_panel=SAMPLING)
    ] = 1.0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The same as --temperature 0.", rich_help_panel=SAMPLING)
    ] = False,
    top_k: Annotated[
        int,
        typer.Option(metavar="K", help="Sample from the k most probable tokens; 0 from all.", rich_help_panel=SAMPLING),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Sample from the fewest tokens that hold this probability; 1 from all.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Drop tokens less probable than this share of the most probable one.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1 it discourages repetition.", rich_help_panel=SAMPLING)
    ] = 1.0,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Completions per prompt and λ.", rich_help_panel=SAMPLING)
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Of all random numbers; they do not depend on the batch or on λ.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Completions decoded at once.", rich_help_panel=SAMPLING)
    ] = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .jsonl file: a line per completion, written as it finishes; run again, it is continued.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print those lines instead of the texts side by side.", rich_help_panel=OUTPUT),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Print tokens as they come: one prompt, one λ.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Decode prompts at one or several λ, in one batched pass.

    **Examples**

    `dera generate --adapter runs/tiny/dpo --lambda 0,0.5,1,2 --prompt "Once upon a time"`

    `dera generate --base org/base --adapter ./dpo --quantization nf4 --chat --lambda 0.6 --prompt "Hi!" --stream`

    `dera generate --adapter ./dpo --lambda=-0.5,0,1 --prompts prompts.jsonl --samples 4 --output out.jsonl`
    """
    from dera_peft.commands.generate import generate as run
    from dera_peft.devices import read_device_map
    from dera_peft.sampling import Sampling

    if greedy:
        temperature = 0.0
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    run(
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device_map=read_device_map(device_map),
        lambdas=lambdas,
        texts=prompt,
        prompts_file=prompts,
        sampling=sampling,
        samples=samples,
        chat=chat,
        batch_size=batch_size,
        output=output,
        as_json=json,
        stream=stream,
    )


@app.command()
def info(
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what would run: branches, fork, join, rows and memory.

    **Examples**

    `dera info --adapter runs/tiny/dpo`

    `dera info --base org/base --adapter ./dpo --quantization nf4 --json`
    """
    from dera_peft.commands.info import info as run
    from dera_peft.devices import read_device_map

    run(base, adapter, quantization, dtype, read_device_map(device_map), as_json=json)


@app.command()
def export(
    lam: Annotated[
        str,
        typer.Option(
            "--lambda",
            metavar="λ",
            help="The strength to export at; of several adapters name=λ,name=λ.",
            rich_help_panel=OUTPUT,
        ),
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder of the new adapter.", rich_help_panel=OUTPUT)],
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    prompt: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="A prompt to compare with DeRa on; repeatable.", rich_help_panel=PROMPTS),
    ] = [],  # noqa: B006
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Prompts to compare on: .txt, .jsonl or path.py:function.", rich_help_panel=PROMPTS
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Render prompts with the tokenizer's chat template.", rich_help_panel=PROMPTS),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Write a plain LoRA adapter at a fixed λ, for any server that loads LoRA, and measure how far it is from DeRa.

    It mixes weights where DeRa mixes logits, so it is an approximation; give prompts to see how good a one.

    **Examples**

    `dera export --adapter ./dpo --lambda 0.6 --output ./dpo-0.6 --prompts test.txt`
    """
    from dera_peft.commands.export import export as run
    from dera_peft.devices import read_device_map

    run(
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device_map=read_device_map(device_map),
        lam=lam,
        folder=output,
        texts=prompt,
        prompts_file=prompts,
        chat=chat,
        as_json=json,
    )


@app.command()
def sweep(
    config: Annotated[str | None, typer.Option(metavar="FILE", help="A YAML file with the keys below.")] = None,
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    prompts: Annotated[str | None, typer.Option(help="Held-out prompts: .txt, .jsonl or path.py:function.")] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="path.py:name of f(prompts, completions, **columns) -> list[float], as in TRL; or a "
            "sequence-classification model with one label: hub id or folder."
        ),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="For samples.jsonl, summary.csv and sweep.png.")] = None,
    lambdas: Annotated[
        list[str], typer.Option("--lambda", metavar="λ[,λ…]", help="Strengths, with commas or the option repeated.")
    ] = [],  # noqa: B006
    samples: Annotated[int | None, typer.Option(min=1, help="Completions per prompt and λ.")] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    chat: Annotated[bool | None, typer.Option(help="Render prompts with the tokenizer's chat template.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Completions decoded at once.")] = None,
) -> None:
    """Decode held-out prompts over a grid of λ, score them, and show reward and KL against λ.

    The command line comes before the config, and that before the defaults. Run again, it continues where it stopped.

    **Examples**

    `dera sweep --config configs/tiny/sweep.yaml`

    `dera sweep --adapter ./dpo --prompts test.txt --reward reward.py:reward --output-dir runs/sweep --lambda 0,0.5,1`
    """
    from dera_peft.commands.common import read_lambdas
    from dera_peft.commands.sweep import sweep as run
    from dera_peft.devices import read_device_map
    from dera_peft.evaluate.sweep import SweepConfig

    settings = SweepConfig.read(
        config,
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device_map=device_map,
        prompts=prompts,
        reward=reward,
        output_dir=output_dir,
        lambdas=read_lambdas(lambdas) if lambdas else None,
        samples=samples,
        max_prompts=max_prompts,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    run(replace(settings, device_map=read_device_map(settings.device_map)))


def main() -> None:
    """Errors that a user can mend: one line, exit code 2. Any other is a defect and shows its traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    be_quiet()
    try:
        app(arguments, prog_name="dera")
    except (DeRaError, OSError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted; an output file keeps what it has, and the same command continues it", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
