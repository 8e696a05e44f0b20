"""
Makes preferences: samples completions from an SFT model, and ranks them by a reward into chosen and rejected ones.

    python -m training.preferences --config configs/tiny/preferences.yaml
    python -m training.preferences --config configs/tiny/preferences.yaml --pairs all --min_margin 0.5
    torchrun --nproc_per_node 8 -m training.preferences --config my.yaml

The folder gets completions.jsonl (every sample with its reward; a killed run goes on from it) and preferences.jsonl, in
TRL's preference format: prompt, chosen and rejected, and the two rewards. Run again with other `pairs`, another
`min_margin`, more `samples` or more prompts, it reuses the completions that are there. Prompts that give no pair are
counted, with the reason. Of several processes each samples a part; their random numbers, and so the completions, are
those of a single one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet
from dera_peft.training.pairs import ALL, BEST_WORST, EMPTY, TOO_LONG, make_pairs, outcome_table
from dera_peft.training.program import (
    HelpFormatter,
    OutputFolder,
    ProgramArguments,
    check_processes,
    parse,
    settings_of,
    start,
)

# What does not decide a completion or its reward: where they are there already, they are reused.
NOT_OF_A_COMPLETION = (
    "batch_size", "device_map", "label_temperature", "max_prompts", "min_margin", "pairs", "samples",
)  # fmt: skip


@dataclass
class PreferenceArguments(ProgramArguments):
    """What to sample, and how to rank it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The SFT model, a whole one or an adapter, or the base of sft_adapter: hub id or folder."},
    )
    sft_adapter: str | None = field(
        default=None, metadata={"help": "A LoRA adapter that makes the base the SFT model: hub id or folder."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "A .txt or .jsonl file, or path.py:function, with a text or chat messages a prompt."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of prompts: a dataset, by hub id, folder, .jsonl/.csv/.parquet file, or path.py:function."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "Its column with the prompts: texts, or chats; of a chat that ends with an answer, what stands "
            "before it."
        },
    )
    reward_columns: list[str] = field(
        default_factory=list, metadata={"help": "Further columns of the dataset that the reward is given."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many prompts."})
    reward: str | None = field(
        default=None,
        metadata={
            "help": "path.py:name of f(prompts, completions, **columns) -> list[float], as in TRL; or a "
            "sequence-classification model with one label: hub id or folder."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for completions and preferences."})
    samples: int = field(default=4, metadata={"help": "Completions per prompt."})
    pairs: str = field(
        default=BEST_WORST,
        metadata={
            "help": "best_worst: of each prompt the best completion against the worst; all: every two.",
            "choices": [BEST_WORST, ALL],
        },
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "In a pair, the better reward must exceed the worse one by more than this."}
    )
    label_temperature: float = field(
        default=0.0,
        metadata={
            "help": "T: of a pair, draw the chosen one with probability sigmoid(difference of rewards / T), as Bradley "
            "and Terry have it; 0: it is always the better one."
        },
    )
    chat: bool = field(default=False, metadata={"help": "Render the prompts with the tokenizer's chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "At most so many new tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the fewest tokens that hold this probability."})
    seed: int = field(default=0, metadata={"help": "Of all random numbers."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at once."})
    quantization: str | None = field(
        default=None,
        metadata={"help": "Load the model in 4 or 8 bits with bitsandbytes.", "choices": ["nf4", "fp4", "int8"]},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    device_map: str | None = field(
        default=None,
        metadata={"help": "As in transformers: auto, cpu, cuda:0. The accelerator by default, if there is one."},
    )

    def check(self) -> None:
        """Raises `DeRaError` for what is missing, or out of range."""
        for name in ("model_name_or_path", "reward", "output_dir"):
            if not getattr(self, name):
                raise DeRaError(f"{name} must be set, in the config or on the command line.")
        if bool(self.prompts) == bool(self.dataset_name):
            raise DeRaError("set prompts (a file) or dataset_name: one of the two.")
        if self.samples < 2:
            raise DeRaError(f"samples={self.samples} must be at least 2, for one to be better than another.")
        if self.min_margin < 0:
            raise DeRaError(f"min_margin={self.min_margin} must not be negative: the chosen one would be the worse.")
        if self.label_temperature < 0:
            raise DeRaError(f"label_temperature={self.label_temperature} must not be negative; 0 is no noise.")
        for name in ("batch_size", "max_prompts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DeRaError(f"{name}={getattr(self, name)} must be at least 1.")


def make_parser():
    from trl import TrlParser

    return TrlParser(
        (PreferenceArguments,),
        prog="python -m training.preferences",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def main(arguments: list[str] | None = None) -> None:
    be_quiet()
    (args,) = parse(make_parser(), arguments)
    args.check()

    from rich.console import Console
    from trl import ModelConfig

    from dera_peft.checkpoint.devices import device_map_of, join_processes
    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.decoding.prompts import column_names
    from dera_peft.decoding.requests import Request
    from dera_peft.decoding.rows import RewardedRow, RowLog, expect_prompts
    from dera_peft.files import write_atomically
    from dera_peft.rewards.functions import check_columns, load_reward, reward_fingerprint
    from dera_peft.training.models import find_source

    processes = join_processes()
    check_processes(args.num_processes)
    device_map = device_map_of(args.device_map, processes)
    reward = load_reward(args.reward, device_map)
    prompts, empty = read_prompts(args)
    source = find_source(ModelConfig(model_name_or_path=args.model_name_or_path), args.sft_adapter)
    if source.is_function:
        raise DeRaError(f"model_name_or_path={source.base!r} is a function; fine-tune what it makes first.")
    # not the prompts: there may be more of them, and each completion is compared with its own
    inputs = {**source.fingerprint(), "reward": reward_fingerprint(args.reward)}
    prompts = prompts[: args.max_prompts]
    check_columns(column_names(prompts))
    folder = Path(args.output_dir)
    output = OutputFolder(folder, settings_of(args, ignore=NOT_OF_A_COMPLETION), inputs, args.overwrite)
    with processes.main_process_first():
        if args.overwrite and processes.is_main_process:
            for file in folder.glob("completions*.jsonl"):
                file.unlink()
    run = settings_fingerprint(output.record)

    number = f"-{processes.process_index}" if processes.process_index else ""

    def read_log() -> tuple[RowLog, dict[Request, RewardedRow]]:
        """The completions in the files of all processes, also of an earlier run with another number of them."""
        expected = expect_prompts(prompts)
        log = RowLog(
            folder / f"completions{number}.jsonl", RewardedRow, run, expected=expected, pattern="completions*.jsonl"
        )
        return log, {row.request: row for row in log.rows}

    requests = [Request(prompt.index, None, sample) for prompt in prompts for sample in range(args.samples)]
    log, finished = read_log()
    todo = [request for request in requests if request not in finished]
    if todo:
        processes.wait_for_everyone()  # all have seen the same files, before any writes
        mine = todo[processes.process_index :: processes.num_processes]
        sample(args, source, prompts, mine, len(requests) - len(todo), log, run, reward, device_map)
        processes.wait_for_everyone()
    if not processes.is_main_process:
        return

    _, finished = read_log()
    rows = [finished[request] for request in requests if request in finished]
    pairs, outcomes = make_pairs(rows, args.pairs, args.min_margin, args.label_temperature, args.seed)
    outcomes[TOO_LONG] = len(prompts) - outcomes.total()
    outcomes[EMPTY] = empty
    Console().print(outcome_table(outcomes))
    if not pairs:
        raise DeRaError("no prompt gives a pair; the table above says why.")
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    write_atomically(folder / "preferences.jsonl", "".join(lines))
    output.complete()
    print(f"{len(pairs)} pairs from {len(prompts) + empty} prompts in {folder / 'preferences.jsonl'}")


def read_prompts(args: PreferenceArguments) -> tuple[list, int]:
    """The prompts, and how many rows of the dataset had none."""
    from dera_peft.decoding.datasets import read_dataset
    from dera_peft.decoding.prompts import Prompt, from_file, is_chat

    if args.prompts:
        return from_file(args.prompts), 0
    dataset = read_dataset(args.dataset_name, args.dataset_split, args.dataset_config)
    for name in (args.prompt_column, *args.reward_columns):
        if name not in dataset.column_names:
            raise DeRaError(f"dataset={args.dataset_name!r} has no column {name!r}; it has {dataset.column_names}.")
    prompts, empty = [], 0
    for number, row in enumerate(dataset.select_columns([args.prompt_column, *args.reward_columns]), start=1):
        content = row[args.prompt_column]
        if is_chat(content) and content[-1]["role"] == "assistant":
            content = content[:-1]
        texts = [message["content"] for message in content] if is_chat(content) else [content]
        if content is None or not any(isinstance(text, str) and text.strip() for text in texts):
            empty += 1
            continue
        columns = {name: row[name] for name in args.reward_columns}
        prompts.append(Prompt(len(prompts), content, f"{args.dataset_name}, row {number}", columns=columns))
    return prompts, empty


def sample(
    args: PreferenceArguments,
    source: Any,
    prompts: list,
    todo: Sequence,
    there: int,
    log: Any,
    run: str,
    reward: Any,
    device_map: Any,
) -> None:
    """
    Adds the completions of the requests `todo` to `log`, each with its reward, but for prompts that are too long.

    Args:
        source: the SFT model, from `find_source`.
        there: how many completions an earlier run has made, for the progress shown.
        log, reward: a `RowLog` and a `Reward`.
        run: fingerprint of the settings.
    """
    from dera_peft.checkpoint.loading import load_config, load_tokenizer
    from dera_peft.decoding.batching import decode
    from dera_peft.decoding.prompts import PromptTooLong, column_names, encode
    from dera_peft.decoding.rows import RewardedRow
    from dera_peft.decoding.sampling import Sampling
    from dera_peft.progress import show_progress
    from dera_peft.rewards.functions import call_reward, columns_of
    from dera_peft.training.sampler import load_sft_model

    sampling = Sampling(args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed)
    config = load_config(source.base, {"revision": source.revision})
    adapters = [source.adapter] if source.adapter else []
    tokenizer = load_tokenizer(*adapters, source.base, revision=source.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens: dict[int, list[int]] = {}
    for index in sorted({request.index for request in todo}):
        try:
            (tokens[index],) = encode([prompts[index]], tokenizer, config, args.max_new_tokens, args.chat)
        except PromptTooLong:
            continue  # it is counted by what is missing in the end
    todo = [request for request in todo if request.index in tokens]
    if not todo:
        return
    names = column_names(prompts)
    model = load_sft_model(source, args.quantization, args.dtype, device_map)
    with show_progress("sampling", there + len(todo), there) as advance:
        for completions in decode(model, tokenizer, tokens, todo, sampling, args.batch_size):
            of = [prompts[completion.request.index] for completion in completions]
            texts = [completion.text for completion in completions]
            rewards = call_reward(reward, [prompt.content for prompt in of], texts, columns_of(of, names))
            log.append(
                RewardedRow.of(run, completion, prompt, reward=value)
                for prompt, completion, value in zip(of, completions, rewards, strict=True)
            )
            advance(len(completions))


if __name__ == "__main__":
    start(main)
