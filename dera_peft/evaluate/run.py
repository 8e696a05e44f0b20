"""A sweep over λ: decode held-out prompts, score the completions, recommend a λ, and write the report."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.devices import device_map_of, join_processes
from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.prompts import Prompt, column_names, read_prompts
from dera_peft.decoding.system_settings import Tokens
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.table import check_names
from dera_peft.evaluate.arms import Arm, by_model, make_arms
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.loaded import LoadedModel
from dera_peft.evaluate.points import anchors, ends
from dera_peft.evaluate.result import SweepResult
from dera_peft.evaluate.results import analyse, finish, with_decoded
from dera_peft.evaluate.worker import SweepWorker
from dera_peft.lock import hold
from dera_peft.model import DeRaModel
from dera_peft.progress import Progress, no_progress
from dera_peft.rewards.functions import NamedReward, check_columns, load_rewards
from dera_peft.rewards.judges import NamedJudge, load_judge
from dera_peft.rewards.metrics import is_better_low

logger = logging.getLogger(__name__)


def sweep(
    config: SweepConfig | None = None,
    *,
    model: DeRaModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = no_progress,
    **keys,
) -> SweepResult | None:
    """
    Decodes, measures, summarises, recommends; writes samples.jsonl, summary.csv, the plots and report.html.

    Every row is kept in `output_dir/parts` as soon as it is computed. Run again with the same model and sampling, also
    after a kill, a sweep continues from there and draws the same random numbers. More λ, samples, prompts, arms or
    rewards add to what is there; a changed reward is called again, and nothing is decoded twice.

    Each process that `torchrun` or `accelerate launch` started works on its share of the prompts; all need one file
    system. The result does not depend on their number, except for rounding.

    Args:
        config: or its keys, as in `SweepConfig`; keys come before a config.
        model: one that is loaded, as `DeRaModel.from_peft` makes of what a trainer holds, in place of base and adapter.
            Its rows are those of its weights as they are now; trained further, it needs another folder.
        tokenizer: of `model`; that of the folders it was loaded from unless given.
        progress: shows how far the sweep is; `dera_peft.progress.show_progress` does it on stderr.

    Returns:
        The results; None in all processes but the first one.

    Raises:
        DeRaError: bad input. Rows on which a reward or the judge fails are marked, and the rest goes on.
    """
    config = SweepConfig(**keys) if config is None else replace(config, **keys)
    if model is None and tokenizer is not None:
        raise DeRaError("tokenizer belongs to a model that is loaded: give the model too.")
    loaded = None if model is None else LoadedModel(model=model, given_tokenizer=tokenizer)
    processes = join_processes()
    device_map = device_map_of(config.device_map, processes)
    if config.output_dir is None:
        raise DeRaError("output_dir is missing: set it in the config or with --output-dir.")
    if config.starts_vllm and processes.num_processes > 1:
        raise DeRaError(
            "engine='vllm' in several processes: each would start vLLM. Start one process, and give vLLM its GPUs "
            "(--vllm-argument tensor_parallel_size=2), or name a running server with --endpoint."
        )
    arms = make_arms(config, loaded)
    if len(arms[0].record.aligned) > 1 and "implicit" in config.rewards:
        raise DeRaError("rewards: 'implicit' is what one adapter itself rewards, and there are several; take another.")
    rewards = load_rewards(config.rewards, arms[0].beta, device_map)
    _check_rewards(config, rewards)
    judge = None if config.judge is None else load_judge(config.judge, device_map)
    if judge is not None and not anchors(arms[0].lambdas):
        wanted = " and ".join(f"λ={lam:g}" for lam in ends(cast("Lambda", arms[0].lambdas[0])))
        raise DeRaError(f"judge={judge.name!r} compares with {wanted}, and lambdas has none of them: add one.")
    prompts = _read_prompts(config, rewards, warns=processes.is_main_process)
    ready_tokenizer, tokens, reference_tokens = encode_prompts(config, arms[0], prompts)
    folder = Path(config.output_dir)
    with hold(folder if processes.is_main_process else None, "output_dir", is_folder=True):
        processes.wait_for_everyone()  # none touches a file before the folder is held
        worker = SweepWorker(
            config,
            arms,
            prompts,
            tokens,
            reference_tokens,
            ready_tokenizer,
            own_indices=_own_indices(tokens, processes.process_index, processes.num_processes),
            device_map=device_map,
            folder=folder,
            rank=processes.process_index,
            progress=progress if processes.is_main_process else no_progress,
        )
        processes.wait_for_everyone()  # all have seen the same files, before any writes
        wanted = worker.all_keys(range(len(prompts)))
        reused = sum(key in worker.completions for key in wanted)
        if processes.is_main_process:
            _warn(config, reused, len(wanted))
        _measure(worker, rewards, judge)
        processes.wait_for_everyone()
        worker.read_files()
        found = analyse(worker, rewards, judge) if processes.is_main_process else None
        lam = found.recommendation.lam if found and found.recommendation and found.recommendation.estimated else None
        (lam,) = broadcast_object_list([lam])
        if lam is not None:
            if processes.is_main_process:
                logger.info(f"{config.output_dir}: decoding at λ*, {lam:g}, which was not among the decoded λ")
            worker.add_lambda(lam)
            _measure(worker, rewards, judge)
            processes.wait_for_everyone()
            worker.read_files()
            found = with_decoded(found, analyse(worker, rewards, judge)) if found is not None else None
        return None if found is None else finish(worker, rewards, judge, found, reused)


def _measure(worker: SweepWorker, rewards: Sequence[NamedReward], judge: NamedJudge | None) -> None:
    """Decodes, scores, rewards and judges what is missing."""
    for group in by_model(worker.arms):
        worker.decode_and_score(group)
    for reward in rewards:
        if reward.function is not None:
            worker.call_reward(reward)
    if judge is not None:
        worker.call_judge(judge)


def _warn(config: SweepConfig, reused: int, count: int) -> None:
    """Tells, before anything is decoded, what a user may not expect of the `count` completions."""
    if config.temperature == 0 and config.samples > 1:
        logger.warning(
            f"temperature=0, samples={config.samples}: greedy decoding gives all samples of a prompt the same text; "
            "one is enough"
        )
    if reused:
        some = "all" if reused == count else f"{reused} of"
        logger.info(f"{config.output_dir}: {some} {count} completions are there already")


def encode_prompts(config: SweepConfig, arm: Arm, prompts: Sequence[Prompt]) -> tuple[Any, Tokens, Tokens | None]:
    """The tokenizer, and each prompt's token ids, as `SystemSettings.encode` gives them."""
    base_config, tokenizer = arm.source.config, arm.source.tokenizer()
    return tokenizer, *config.encode(prompts, tokenizer, base_config, config.max_new_tokens, config.chat)


def _check_rewards(config: SweepConfig, rewards: Sequence[NamedReward]) -> None:
    if not rewards:
        raise DeRaError("rewards is missing: set it in the config or with --reward.")
    first, *others = names = [reward.name for reward in rewards]
    check_names(names)
    if config.choose_by is not None and config.choose_by not in names:
        raise DeRaError(f"choose_by={config.choose_by!r} is not the name of a reward; there are {names}.")
    if config.gold is not None and config.gold not in others:
        raise DeRaError(
            f"gold={config.gold!r} must be the name of a reward that is compared with the first one, {first!r}; "
            f"further rewards are {others or 'not there'}."
        )
    if config.choose_by is None and is_better_low(first):
        raise DeRaError(
            f"rewards: by the first one λ is chosen, and a high {first} is no merit; put another one first."
        )
    if config.choose_by is not None and is_better_low(config.choose_by):
        raise DeRaError(f"choose_by: a high {config.choose_by} is no merit; choose by another reward.")


def _read_prompts(config: SweepConfig, rewards: Sequence[NamedReward], warns: bool) -> list[Prompt]:
    prompts = read_prompts(config.prompts, config.prompt_column, config.split, config.subset, config.max_prompts)
    where = config.prompts if isinstance(config.prompts, str) else "prompts"
    if warns and (own := sum(prompt.lam is not None for prompt in prompts)):
        logger.warning(
            f"{where}: {own} of {len(prompts)} prompts have a lambda of their own, which a sweep leaves aside: it "
            "decodes each at all of its lambdas"
        )
    if config.group is not None:
        for prompt in prompts:
            if config.group not in prompt.columns:
                raise DeRaError(
                    f"{prompt.source}: has no {config.group!r} to tell its group by; it has {sorted(prompt.columns)}."
                )
            if prompt.columns[config.group] is None:
                raise DeRaError(f"{prompt.source}: its {config.group!r}, which tells its group, is null: give it one.")
    if any(reward.function is not None for reward in rewards):
        check_columns(column_names(prompts))
    for reward in rewards:
        kind, _, column = reward.name.partition(":")
        if reward.metric and kind == "exact_match" and not any(column in prompt.columns for prompt in prompts):
            raise DeRaError(f"rewards: {reward.name!r}: no prompt has a column {column!r}.")
    return prompts


def _own_indices(tokens: Sequence[Sequence[int]], rank: int, count: int) -> list[int]:
    """The prompts of one of `count` processes: the longest first, each to the one with the fewest tokens so far."""
    loads, parts = [0] * count, [[] for _ in range(count)]
    for index in sorted(range(len(tokens)), key=lambda index: (-len(tokens[index]), index)):
        least = loads.index(min(loads))
        loads[least] += len(tokens[index])
        parts[least].append(index)
    return sorted(parts[rank])
