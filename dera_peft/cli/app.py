"""The `dera` command."""

import sys
import traceback
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
MODEL, PROMPTS, SAMPLING, MEASURE, OUTPUT = "Model", "Prompts", "Sampling", "Measuring", "Output"

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
Lambdas = Annotated[
    list[str],
    typer.Option(
        "--lambda",
        metavar="λ[,λ…]",
        help="Strengths, with commas or the option repeated. By default the one that dera.json names, else 1.",
        rich_help_panel=PROMPTS,
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Render prompts with the tokenizer's chat template.", rich_help_panel=PROMPTS)
]

# of `generate`, and of `sweep`, where what is not given is the config's
MAX_NEW_TOKENS = typer.Option(metavar="N", help="At most so many new tokens.", rich_help_panel=SAMPLING)
TEMPERATURE = typer.Option(metavar="T", help="Of sampling; 0 is greedy.", rich_help_panel=SAMPLING)
MIN_P = typer.Option(
    metavar="P", help="Drop tokens less probable than this share of the most probable one.", rich_help_panel=SAMPLING
)
REPETITION_PENALTY = typer.Option(metavar="X", help="Above 1 it discourages repetition.", rich_help_panel=SAMPLING)


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
    lambdas: Lambdas = [],  # noqa: B006 (Typer reads it, nobody changes it)
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
    chat: Chat = False,
    max_new_tokens: Annotated[int, MAX_NEW_TOKENS] = 128,
    temperature: Annotated[float, TEMPERATURE] = 1.0,
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
    min_p: Annotated[float, MIN_P] = 0.0,
    repetition_penalty: Annotated[float, REPETITION_PENALTY] = 1.0,
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
    from dera_peft.checkpoint.devices import read_device_map
    from dera_peft.cli.generate import generate as run
    from dera_peft.decoding.sampling import Sampling

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
def score(
    completions: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A .jsonl file: rows with a 'prompt' (a text or chat messages) and a 'completion' (a text), as those "
            "of dera generate --output.",
            rich_help_panel=PROMPTS,
        ),
    ],
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    lambdas: Lambdas = [],  # noqa: B006
    chat: Chat = False,
    end: Annotated[
        bool | None,
        typer.Option(
            "--end/--no-end",
            help="Whether the tokenizer's end token is part of each completion. By default it is of those whose row "
            "has 'finish': 'eos'.",
            show_default=False,
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="Divides the mixed logits; the KL is at 1.", rich_help_panel=SAMPLING),
    ] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .jsonl file: a line per completion and λ, written as it finishes; run again, it is continued.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Also give the values of each token in those lines.", rich_help_panel=OUTPUT),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print those lines instead of the table.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Say how probable given completions are at many λ, from one pass: total, per token, perplexity, KL; in nats.

    A completion is split into tokens by itself and put behind its prompt's, which is how it was decoded.

    **Examples**

    `dera score --adapter ./dpo --completions out.jsonl --lambda 0,0.25,0.5,0.75,1`

    `dera score --adapter ./dpo --completions chats.jsonl --chat --end --lambda 0,1 --output scores.jsonl`
    """
    from dera_peft.checkpoint.devices import read_device_map
    from dera_peft.cli.score import score as run

    run(
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device_map=read_device_map(device_map),
        completions_file=completions,
        lambdas=lambdas,
        chat=chat,
        end=end,
        temperature=temperature,
        per_token=tokens,
        output=output,
        as_json=json,
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
    from dera_peft.checkpoint.devices import read_device_map
    from dera_peft.cli.info import info as run

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
    chat: Chat = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Write a plain LoRA adapter at a fixed λ, for any server that loads LoRA, and measure how far it is from DeRa.

    It mixes weights where DeRa mixes logits, so it is an approximation; give prompts to see how good a one.

    **Examples**

    `dera export --adapter ./dpo --lambda 0.6 --output ./dpo-0.6 --prompts test.txt`
    """
    from dera_peft.checkpoint.devices import read_device_map
    from dera_peft.cli.export import export as run

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
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only a quick look, without rewards: does the adapter respond to λ at all, and at which λ does text "
            "fall apart?",
        ),
    ] = False,
    base: Base = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Held-out prompts: .txt (one a line), .jsonl or .csv (rows), path.py:function, or a dataset (hub id "
            "or folder).",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset; 'train' by default.", rich_help_panel=PROMPTS)
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(help="Subset (configuration) of a hub dataset that has several.", rich_help_panel=PROMPTS),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="What holds the prompts, texts or chats; 'prompt' by default. Rewards are given the other columns.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first so many.", rich_help_panel=PROMPTS)
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Render them with the tokenizer's chat template.", rich_help_panel=PROMPTS)
    ] = None,
    reward: Annotated[
        list[str],
        typer.Option(
            metavar="REWARD",
            help="What scores completions; can be repeated, and λ is chosen by the first one. path.py:name of "
            "f(prompts, completions, **columns) -> list[float], as in TRL; a sequence-classification model with one "
            "label (hub id or folder); or length, implicit (what the adapter itself rewards), perplexity (under the "
            "reference), repetition, distinct-1 (2, 3 …), exact_match:COLUMN.",
            rich_help_panel=MEASURE,
        ),
    ] = [],  # noqa: B006
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Compares completions with those at λ=0 and λ=1, for win rates: path.py:name of f(prompts, pairs) -> "
            "list of 0 (the first is better), 1 or -1 (neither); or a sequence-classification model.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="A column of the prompts: results for each of its values.", rich_help_panel=MEASURE
        ),
    ] = None,
    rule: Annotated[
        Literal["reward", "lower_bound", "kl_budget", "worst_group"] | None,
        typer.Option(
            metavar="RULE",
            help="How λ is recommended: reward (the highest mean, the default), lower_bound (the highest lower end of "
            "its interval), kl_budget (the highest mean within --kl-budget), worst_group (the highest mean of the "
            "group that fares worst).",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    kl_budget: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="KL to the reference, a completion, at most.", rich_help_panel=MEASURE),
    ] = None,
    lambdas: Annotated[
        list[str],
        typer.Option(
            "--lambda",
            metavar="λ[,λ…]",
            help="Strengths, with commas or the option repeated; 0 to 2 by default.",
            rich_help_panel=SAMPLING,
        ),
    ] = [],  # noqa: B006
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Completions per prompt and λ.", rich_help_panel=SAMPLING)
    ] = None,
    mixing: Annotated[
        list[str],
        typer.Option(
            metavar="KIND",
            help="logits (DeRa); given again as weights, the adapter's weights scaled by λ are a line beside it.",
            rich_help_panel=SAMPLING,
        ),
    ] = [],  # noqa: B006
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=LORA",
            help="A further line: another adapter over the same reference, as trained; can be repeated.",
            rich_help_panel=SAMPLING,
        ),
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int | None, MAX_NEW_TOKENS] = None,
    temperature: Annotated[float | None, TEMPERATURE] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Sample from the k most probable tokens.", rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from the fewest tokens that hold this probability.", rich_help_panel=SAMPLING
        ),
    ] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    repetition_penalty: Annotated[float | None, REPETITION_PENALTY] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of all random numbers.", rich_help_panel=SAMPLING)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Completions decoded at once, at most.", rich_help_panel=SAMPLING),
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="For report.html, the plots, summary.csv and samples.jsonl; and what is made on the way, in parts/.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Find the right λ on held-out prompts: decode at several, measure, recommend one, show it.

    Run again, it goes on where it stopped; more λ, samples or rewards add to what is there. The command line comes
    before the config, and that before the defaults. It exits with 1 where a reward failed on some rows. On several
    GPUs: `torchrun --nproc_per_node N -m dera_peft.cli sweep …`.

    **Examples**

    `dera sweep --config configs/tiny/sweep.yaml`

    `dera sweep --adapter ./dpo --prompts test.txt --check`

    `dera sweep --adapter ./dpo --prompts test.jsonl --reward reward.py:reward --reward length --output-dir runs/sweep`

    `dera sweep --adapter ./dpo --prompts org/dataset --split test --reward org/reward-model --judge judge.py:judge
    --rule kl_budget --kl-budget 5 --lambda 0,0.5,1,2 --model retrained=./dpo-2 --output-dir runs/sweep`
    """
    from dera_peft.cli.console import read_lambdas, read_models
    from dera_peft.evaluate.config import SweepConfig

    settings = SweepConfig.read(
        config,
        base=base,
        adapter=adapter,
        quantization=quantization,
        dtype=dtype,
        device_map=device_map,
        prompts=prompts,
        split=split,
        subset=subset,
        prompt_column=prompt_column,
        max_prompts=max_prompts,
        chat=chat,
        rewards=reward or None,
        judge=judge,
        group=group,
        rule=rule,
        kl_budget=kl_budget,
        lambdas=read_lambdas(lambdas) if lambdas else None,
        samples=samples,
        mixing=mixing or None,
        models=read_models(model) if model else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        batch_size=batch_size,
        output_dir=output_dir,
    )
    if check:
        from dera_peft.cli.check import check as run
    else:
        from dera_peft.cli.sweep import sweep as run
    run(settings)


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
    from dera_peft.cli.console import read_lambdas

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
            print(
                "interrupted; an output file keeps what it has, and the command that writes it continues it",
                file=sys.stderr,
            )
        raise


if __name__ == "__main__":
    main()
