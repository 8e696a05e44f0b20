"""A sweep over λ: decode held-out prompts, score the completions, recommend a λ, and write the report."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.devices import device_map_of, join_processes
from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.prompts import Prompt, column_names, read_prompts
from dera_peft.decoding.rows import dumps
from dera_peft.decoding.system_settings import Tokens
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.best import best_arm
from dera_peft.evaluate.analysis.choice import Rule
from dera_peft.evaluate.analysis.curve import Curve, estimate_curve, reason_off
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.analysis.table import check_names, write_csv
from dera_peft.evaluate.arms import Arm, by_model, make_arms
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.loaded import LoadedModel
from dera_peft.evaluate.points import anchors, ends
from dera_peft.evaluate.report.page import write_report
from dera_peft.evaluate.report.plots import plot_pareto, plot_sweep
from dera_peft.evaluate.result import SweepResult
from dera_peft.evaluate.retrain import FILE_NAME as RETRAIN
from dera_peft.evaluate.retrain import retrain_command
from dera_peft.evaluate.rows import Key, RewardRow
from dera_peft.evaluate.worker import SweepWorker
from dera_peft.files import write_atomically
from dera_peft.lock import hold
from dera_peft.model import DeRaModel
from dera_peft.progress import Progress, no_progress
from dera_peft.rewards.functions import NamedReward, check_columns, load_rewards
from dera_peft.rewards.judges import NamedJudge, load_judge
from dera_peft.rewards.metrics import Measured, is_better_low
from dera_peft.versions import package_versions

FILES = ("report.html", "sweep.png", "sweep.svg", "pareto.png", "pareto.svg", "summary.csv", "samples.jsonl")
IN_MEMORY = ("log_p", "kl_grid", "token_views")  # of a row, what samples.jsonl does without

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
    arms = make_arms(config, loaded)
    if len(arms[0].record.aligned) > 1 and "implicit" in config.rewards:
        raise DeRaError("rewards: 'implicit' is what one adapter itself rewards, and there are several; take another.")
    rewards = load_rewards(config.rewards, arms[0].beta, device_map)
    _check_rewards(rewards)
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
        for group in by_model(arms):
            worker.decode_and_score(group)
        for reward in rewards:
            if reward.function is not None:
                worker.call_reward(reward)
        if judge is not None:
            worker.call_judge(judge)
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return None
        worker.read_files()
        return _finish(worker, rewards, judge, reused)


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


def _check_rewards(rewards: Sequence[NamedReward]) -> None:
    if not rewards:
        raise DeRaError("rewards is missing: set it in the config or with --reward.")
    check_names([reward.name for reward in rewards])
    if is_better_low(rewards[0].name):
        raise DeRaError(
            f"rewards: by the first one λ is chosen, and a high {rewards[0].name} is no merit; put another one first."
        )


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


# -- the results ------------------------------------------------------------------------------------------------------


def _finish(worker: SweepWorker, rewards: Sequence[NamedReward], judge: NamedJudge | None, reused: int) -> SweepResult:
    config, folder, first = worker.config, worker.folder, worker.arms[0]
    rows = _join_rows(worker, rewards, judge)
    names = [reward.name for reward in rewards]
    rule = Rule(config.rule, config.kl_budget, config.effective_radius)
    summaries = summarise(rows, config.group, config.seed, rule.radius)
    if worker.reads_grid:
        curve = estimate_curve(rows, worker.grid, names, config.seed)
    else:
        curve = Curve(reason=reason_off(config.sampling))
    recommendation, reason = None, f"the reward {names[0]!r} has no value at any λ."
    if any(row["rewards"][names[0]] is not None for row in rows if row["arm"] == LOGITS):
        try:
            recommendation = recommend(
                summaries, curve, rule.name, names[0], rule.kl_budget, first.beta, rule.radius, config.prompts_differ
            )
            reason = None
        except DeRaError as error:  # there is still all that was measured to be shown
            reason = str(error)
    command = None
    if recommendation is not None and recommendation.beta is not None and recommendation.lam != 1:
        command = retrain_command(first.adapter, first.record, recommendation.beta, folder)

    best = best_arm(summaries, curve, rule, names[0], config.seed)
    if best is not None:
        arm = next(arm for arm in worker.arms if arm.name == best.best.arm)
        best = replace(best, use=arm.use(best.best.lam))

    models = {arm.name: arm.place for arm in worker.arms if not arm.is_own}
    title = f"{len(worker.prompts)} prompts, {config.samples} samples each; bars: 95 % over prompts"
    for ending in ("png", "svg"):
        inputs = summaries, curve, recommendation, names[0]
        plot_sweep(*inputs, folder / f"sweep.{ending}", title, models, best)
        plot_pareto(*inputs, folder / f"pareto.{ending}", title, models, best)
    lines = ({name: value for name, value in row.items() if name not in IN_MEMORY} for row in rows)
    written = (dumps(line) + "\n" for line in lines)
    write_atomically(folder / "samples.jsonl", "".join(written))
    write_csv(summaries, folder / "summary.csv")
    facts = _facts(worker, rewards, judge)
    aligned = first.record.aligned
    what = first.adapter if len(aligned) == 1 else " and ".join(aligned)
    title = f"How strong should {what if first.record.branches_differ else 'the principle'} be?"
    inputs = summaries, curve, recommendation, rows, command, models
    write_report(folder / "report.html", title, facts, *inputs, reason=reason, best=best)
    failed = sum("errors" in row for row in rows)
    files = [*FILES, RETRAIN] if command is not None and RETRAIN in command else list(FILES)
    return SweepResult(summaries, curve, recommendation, reason, best, command, rows, reused, failed, files)


def _join_rows(worker: SweepWorker, rewards: Sequence[NamedReward], judge: NamedJudge | None) -> list[dict]:
    """Each completion with its score, rewards and verdicts, by arm, prompt, λ and sample."""
    scores, reward_rows = worker.scores(), worker.rewards()
    keys = worker.all_keys(range(len(worker.prompts)))
    verdicts: dict[Key, dict[str, RewardRow]] = {}
    if judge is not None:
        for name, key, other in worker.comparisons(keys):
            verdict = reward_rows[name, key, worker.judge_run(judge, key, other)]
            verdicts.setdefault(key, {})[f"{other.lam:g}"] = verdict
    rows = []
    for key in keys:
        completion, score, prompt = worker.completions[key], scores[key], worker.prompts[key.index]
        ids, has_end = completion.token_ids, completion.finish_reason == "eos"
        measured = Measured(
            completion.completion,
            tokens=ids[:-1] if has_end else ids,
            log_ref=score.log_ref,
            log_aligned=score.log_aligned,
            length=len(ids),
            columns=prompt.columns,
        )
        values: dict[str, float | None] = {}
        errors: dict[str, str] = {}
        for reward in rewards:
            if reward.metric is not None:
                values[reward.name] = reward.metric(measured)
                continue
            reward_row = reward_rows[reward.name, key, worker.reward_run(reward, key)]
            values[reward.name] = reward_row.value
            if reward_row.error is not None:
                errors[reward.name] = reward_row.error
        judged = verdicts.get(key, {})
        errors |= {f"judge {lam}": verdict.error for lam, verdict in judged.items() if verdict.error is not None}
        row = {
            "run": completion.run,
            "arm": key.arm,
            "prompt_index": key.index,
            "prompt": prompt.content,
            "columns": prompt.columns,
            "lambda": key.lam,
            "sample": key.sample,
            "completion": completion.completion,
            "num_tokens": len(ids),
            "finish_reason": completion.finish_reason,
            "token_ids": ids,
            "end_token_id": ids[-1] if has_end else None,
            **({} if completion.token_lambda is None else {"token_lambda": completion.token_lambda}),
            "kl": score.kl,
            "rewards": values,
        }
        if errors:
            row["errors"] = errors
        if judge is not None:
            row["judged"] = {lam: verdict.value for lam, verdict in judged.items()}
        in_memory = {name: getattr(score, name) for name in IN_MEMORY}
        rows.append(row | {name: value for name, value in in_memory.items() if value is not None})
    return rows


def _branch_facts(config: SweepConfig, arm: Arm) -> dict[str, str]:
    """What the aligned branch and the reference differ by."""
    if len(arm.record.aligned) > 1 and not config.prompts_differ:
        return {"adapters": arm.adapter}
    facts = {"adapter": arm.adapter} if arm.record.branches_differ else {}
    if not config.prompts_differ:
        return facts | {"β of its training": "not known" if arm.beta is None else f"{arm.beta:g}"}
    return facts | {
        "system prompt, aligned": config.principle or "the prompt's own, if any",
        "system prompt, reference": config.reference_system or "the prompt's own, if any",
    }


def _facts(worker: SweepWorker, rewards: Sequence[NamedReward], judge: NamedJudge | None) -> dict[str, str]:
    """What was swept, for the report."""
    config, first = worker.config, worker.arms[0]
    sampling = config.sampling
    settings = {
        "temperature": (sampling.temperature, 1.0), "top_k": (sampling.top_k, 0), "top_p": (sampling.top_p, 1.0),
        "min_p": (sampling.min_p, 0.0), "repetition_penalty": (sampling.repetition_penalty, 1.0),
    }  # fmt: skip
    changed = ", ".join(f"{name} {value:g}" for name, (value, plain) in settings.items() if value != plain)
    if sampling.temperature == 0:
        changed = "greedy"
    facts = {
        "base": first.record.base,
        **_branch_facts(config, first),
        "quantization": first.source.quantized_to()[0] or "none",
        "prompts": f"{len(worker.prompts)} of {config.prompts if isinstance(config.prompts, str) else 'a list'}",
        "samples": f"{config.samples} per prompt and λ",
        "sampling": f"{changed or 'temperature 1'}, at most {sampling.max_new_tokens} tokens, seed {sampling.seed}",
        "rewards": ", ".join(reward.name for reward in rewards),
    }
    if judge is not None:
        facts["judge"] = judge.name
    for arm in worker.arms[1:]:
        beta = "" if arm.is_own or arm.beta is None else f" (β = {arm.beta:g})"
        facts[f"arm {arm.name}"] = f"{arm.ways}{beta}"
    if sampling.temperature not in (0, 1):
        facts["KL and perplexity"] = "at temperature 1, along samples that were drawn at the temperature above"
    return facts | {
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        "date": date.today().isoformat(),
    }
