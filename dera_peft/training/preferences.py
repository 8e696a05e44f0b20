"""
Makes preferences: samples completions from an SFT model, and ranks them by a reward into chosen and rejected ones.

    dera preferences --config configs/tiny/preferences.yaml
    dera preferences --config configs/tiny/preferences.yaml --pairs all --min_margin 0.5
    torchrun --nproc_per_node 8 -m dera_peft.cli preferences --config my.yaml

The folder gets completions.jsonl (every sample with its reward; a killed run goes on from it) and preferences.jsonl, in
TRL's preference format: prompt, chosen and rejected, and the two rewards. Run again with other `pairs`, another
`min_margin`, more `samples` or more prompts, it reuses the completions that are there. Prompts that give no pair are
counted, with the reason. Of several processes each samples a part; their random numbers, and so the completions, are
those of a single one.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dera_peft.checkpoint.source import Dtype, ModelSource, Quantization
from dera_peft.decoding.batch_size import batch_size_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.settings import AT_LEAST_1, Check, setting, setting_like
from dera_peft.training.pairs import BEST_WORST, EMPTY, TOO_LONG, make_pairs, outcome_table
from dera_peft.training.program import (
    OutputFolder,
    ProgramSettings,
    check_files,
    check_processes,
    hold_folder,
    settings_of,
)

if TYPE_CHECKING:
    from dera_peft.decoding.prompts import Prompt
    from dera_peft.training.sft_model import SFTModel

# What does not decide a completion or its reward: where they are there already, they are reused.
NOT_OF_A_COMPLETION = (
    "batch_size", "device_map", "label_temperature", "max_prompts", "min_margin", "pairs", "samples",
)  # fmt: skip


@dataclass(frozen=True)
class PreferenceSettings(ProgramSettings):
    """What to sample, and how to rank it."""

    model_name_or_path: str | None = setting(
        None, "The SFT model, a whole one or an adapter, or the base of sft_adapter: hub id or folder.", metavar="MODEL"
    )
    sft_adapter: str | None = setting(
        None, "A LoRA adapter that makes the base the SFT model: hub id or folder.", metavar="LORA"
    )
    quantization: Quantization | None = setting_like(ModelSource, "quantization")
    dtype: Dtype | None = setting_like(ModelSource, "dtype")
    device_map: str | None = setting_like(ModelSource, "device_map")
    prompts: str | None = setting(
        None, "A .txt, .jsonl or .csv file, or path.py:function, with a text or chat messages a prompt.", metavar="FILE"
    )
    dataset_name: str | None = setting(
        None,
        "Instead of prompts: a dataset, by hub id, folder, .jsonl/.csv/.parquet file, or path.py:function.",
        metavar="DATA",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.", metavar="NAME")
    dataset_split: str = setting("train", "Split of the dataset.", metavar="SPLIT")
    prompt_column: str = setting(
        "prompt",
        "Its column with the prompts, texts or chats. One that is not called prompt may hold whole chats, of which the "
        "prompt is what stands before the last answer.",
        metavar="COLUMN",
    )
    reward_columns: tuple[str, ...] = setting(
        (), "Further columns of the dataset that the reward is given.", metavar="COLUMN"
    )
    max_prompts: int | None = setting(None, "Use the first so many prompts.", check=AT_LEAST_1, metavar="N")
    chat: bool = setting_like(PromptSettings, "chat")
    reward: str | None = setting(
        None,
        "path.py:name of f(prompts, completions, **columns) -> list[float], as in TRL; or a sequence-classification "
        "model with one label: hub id or folder.",
        metavar="REWARD",
    )
    output_dir: str | None = setting(None, "Folder for completions and preferences.", metavar="DIR")
    samples: int = setting(
        4,
        "Completions per prompt.",
        check=Check(lambda value: value >= 2, "at least 2, for one to be better than another"),
        metavar="N",
    )
    pairs: Literal["best_worst", "all"] = setting(
        BEST_WORST, "best_worst: of each prompt the best completion against the worst; all: every two."
    )
    min_margin: float = setting(
        0.0, "In a pair, the better reward must exceed the worse one by more than this.", metavar="X"
    )
    label_temperature: float = setting(
        0.0,
        "T: of a pair, draw the chosen one with probability sigmoid(difference of rewards / T), as Bradley and Terry "
        "have it; 0: it is always the better one.",
        metavar="T",
    )
    batch_size: int | None = batch_size_setting()

    def __post_init__(self):
        super().__post_init__()
        for name in ("model_name_or_path", "reward", "output_dir"):
            if not getattr(self, name):
                raise DeRaError(f"{name} must be set, in the config or on the command line.")
        if bool(self.prompts) == bool(self.dataset_name):
            raise DeRaError("set prompts (a file) or dataset_name: one of the two.")
        if self.min_margin < 0:
            raise DeRaError(f"min_margin={self.min_margin} must not be negative: the chosen one would be the worse.")
        if self.label_temperature < 0:
            raise DeRaError(f"label_temperature={self.label_temperature} must not be negative; 0 is no noise.")


@dataclass(frozen=True)
class PreferenceSampling(Sampling):
    """Completions for preferences are longer unless told otherwise: one that is cut stands in no pair."""

    max_new_tokens: int = setting_like(Sampling, "max_new_tokens", 256)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
        DeRaError: an argument is not known or can't be, or no prompt gives a pair.
    """
    check_files(arguments)
    with ExitStack() as held:
        sample_and_rank(arguments, held)


def sample_and_rank(arguments: Sequence[str] | None, held: ExitStack) -> None:
    """Samples and ranks, in a folder that `held` keeps other programs out of."""
    from dera_peft.training.parser import Parser

    settings, sampling = Parser("dera preferences", __doc__, PreferenceSettings, PreferenceSampling).read(arguments)
    held.enter_context(hold_folder(settings.output_dir))

    from rich.console import Console

    from dera_peft.checkpoint.devices import device_map_of, join_processes
    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.decoding.prompts import column_names
    from dera_peft.decoding.requests import Request
    from dera_peft.decoding.rows import RewardedRow, RowLog, expect_prompts
    from dera_peft.files import write_atomically
    from dera_peft.rewards.functions import check_columns, load_reward, reward_fingerprint
    from dera_peft.training.sft_model import find_sft_model
    from dera_peft.user_code import is_object_path

    if is_object_path(settings.model_name_or_path):
        raise DeRaError(
            f"model_name_or_path={settings.model_name_or_path!r} is a function; fine-tune what it makes first."
        )
    processes = join_processes()
    check_processes(settings.num_processes)
    device_map = device_map_of(settings.device_map, processes)
    reward = load_reward(settings.reward, device_map)
    prompts, empty = read_prompts(settings)
    sft_model = find_sft_model(
        settings.model_name_or_path,
        settings.sft_adapter,
        quantization=settings.quantization,
        dtype=settings.dtype,
        device_map=device_map,
    )
    # not the prompts: there may be more of them, and each completion is compared with its own
    inputs = {**sft_model.fingerprint(), "reward": reward_fingerprint(settings.reward)}
    prompts = prompts[: settings.max_prompts]
    check_columns(column_names(prompts))
    folder = Path(settings.output_dir)
    output = OutputFolder(
        folder,
        settings_of(settings, sampling, ignore=NOT_OF_A_COMPLETION),
        inputs,
        settings.overwrite,
        has_model=False,
    )
    with processes.main_process_first():
        if settings.overwrite and processes.is_main_process:
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

    requests = [Request(prompt.index, None, sample) for prompt in prompts for sample in range(settings.samples)]
    log, finished = read_log()
    there = [request for request in requests if request in finished]
    todo = [request for request in requests if request not in finished]
    share = slice(processes.process_index, None, processes.num_processes)
    if todo:
        processes.wait_for_everyone()  # all have seen the same files, before any writes
        sample(settings, sampling, sft_model, prompts, todo[share], len(there[share]), log, run, reward)
        processes.wait_for_everyone()
    if not processes.is_main_process:
        return

    _, finished = read_log()
    rows = [finished[request] for request in requests if request in finished]
    pairs, outcomes = make_pairs(
        rows, settings.pairs, settings.min_margin, settings.label_temperature, sampling.seed, settings.chat
    )
    outcomes[TOO_LONG] = len(prompts) - outcomes.total()
    outcomes[EMPTY] = empty
    Console().print(outcome_table(outcomes))
    if not pairs:
        raise DeRaError("no prompt gives a pair; the table above says why.")
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    write_atomically(folder / "preferences.jsonl", "".join(lines))
    output.complete()
    print(f"{len(pairs)} pairs from {len(prompts) + empty} prompts in {folder / 'preferences.jsonl'}")


def read_prompts(settings: PreferenceSettings) -> "tuple[list[Prompt], int]":
    """The prompts of a file, or of a dataset; and how many rows of the dataset have none."""
    from dera_peft.decoding.prompts import from_dataset, from_file

    if settings.prompts:
        return from_file(settings.prompts), 0
    assert settings.dataset_name is not None  # one of the two was checked to be there
    return from_dataset(
        settings.dataset_name,
        settings.dataset_split,
        settings.dataset_config,
        settings.prompt_column,
        argument="dataset_name",
        columns=settings.reward_columns,
        skip_empty=True,
    )


def sample(
    settings: PreferenceSettings,
    sampling: Sampling,
    sft_model: "SFTModel",
    prompts: list,
    todo: Sequence,
    there: int,
    log: Any,
    run: str,
    reward: Any,
) -> None:
    """
    Adds the completions of the requests `todo` to `log`, each with its reward, but for prompts that are too long.

    Args:
        there: this process's share of the completions that an earlier run has made, for the progress shown.
        log, reward: a `RowLog` and a `Reward`.
        run: fingerprint of the settings.
    """
    from dera_peft.decoding.batching import decode
    from dera_peft.decoding.prompts import PromptTooLong, column_names, encode
    from dera_peft.decoding.rows import RewardedRow
    from dera_peft.progress import show_progress
    from dera_peft.rewards.functions import call_reward, columns_of

    config, tokenizer = sft_model.config, sft_model.tokenizer()
    tokens: dict[int, list[int]] = {}
    for index in sorted({request.index for request in todo}):
        try:
            (tokens[index],) = encode([prompts[index]], tokenizer, config, sampling.max_new_tokens, settings.chat)
        except PromptTooLong:
            continue  # it is counted by what is missing in the end
    todo = [request for request in todo if request.index in tokens]
    if not todo:
        return
    names = column_names(prompts) if settings.prompts else settings.reward_columns
    model = sft_model.load_to_sample()
    with show_progress("sampling", there + len(todo), there) as advance:
        for completions in decode(model, tokenizer, tokens, todo, sampling, settings.batch_size):
            of = [prompts[completion.request.index] for completion in completions]
            texts = [completion.text for completion in completions]
            rewards = call_reward(
                reward,
                [prompt.content for prompt in of],
                texts,
                columns_of(of, names),
                token_ids=[completion.tokens for completion in completions],
                chat=settings.chat,
            )
            log.append(
                RewardedRow.of(run, completion, prompt, reward=value)
                for prompt, completion, value in zip(of, completions, rewards, strict=True)
            )
            advance(len(completions))
