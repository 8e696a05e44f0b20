"""What a sweep's rows come to: summaries, curve, recommendation, and the files that show them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from dera_peft.decoding.rows import dumps
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate import benchmarks
from dera_peft.evaluate.analysis.best import BestArm, best_arm
from dera_peft.evaluate.analysis.choice import Rule
from dera_peft.evaluate.analysis.curve import Curve, estimate_curve, reason_off
from dera_peft.evaluate.analysis.guards import limits_of
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.recommendation import Decoded, Recommendation
from dera_peft.evaluate.analysis.summary import LambdaSummary, resamples_of, summarise
from dera_peft.evaluate.analysis.table import write_csv
from dera_peft.evaluate.arms import Arm
from dera_peft.evaluate.benchmarks import BenchmarkRow
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.page import write_report
from dera_peft.evaluate.report.plots import plot_pareto, plot_sweep
from dera_peft.evaluate.result import SweepResult
from dera_peft.evaluate.retrain import FILE_NAME as RETRAIN
from dera_peft.evaluate.retrain import retrain_command
from dera_peft.evaluate.rows import Key, RewardRow
from dera_peft.evaluate.use import commands
from dera_peft.evaluate.worker import SweepWorker
from dera_peft.files import write_atomically
from dera_peft.rewards.functions import NamedReward
from dera_peft.rewards.judges import NamedJudge
from dera_peft.rewards.metrics import Measured, perplexity, repetition
from dera_peft.versions import package_versions

RECOMMENDATION = "recommendation.json"
PICTURES = ("sweep.png", "sweep.svg", "pareto.png", "pareto.svg")
FILES = ("report.html", *PICTURES, "summary.csv", "samples.jsonl", RECOMMENDATION)
OF_SCORES = ("log_p", "kl_grid", "token_views")
IN_MEMORY = (*OF_SCORES, "guards")  # of a row, what samples.jsonl does without


@dataclass(frozen=True)
class Analysis:
    """
    What rows say.

    Attributes:
        rows: as in `SweepResult`.
        reason: why there is no recommendation.
    """

    rows: list[dict]
    summaries: list[LambdaSummary]
    curve: Curve
    recommendation: Recommendation | None
    reason: str | None
    best: BestArm | None


def analyse(worker: SweepWorker, rewards: Sequence[NamedReward], judge: NamedJudge | None) -> Analysis:
    """Of the rows of the arms' λ as they are now."""
    config, first = worker.config, worker.arms[0]
    rows = _join_rows(worker, rewards, judge)
    names = [reward.name for reward in rewards]
    chosen_by = config.choose_by or names[0]
    rule = Rule(config.rule, config.kl_budget, config.effective_radius, config.standard_errors)
    summaries = summarise(rows, config.group, config.seed, rule.radius, chosen_by)
    if worker.reads_grid:
        curve = estimate_curve(rows, worker.grid, names, config.seed, config.group)
    else:
        curve = Curve(reason=reason_off(config.sampling, config.curve))
    limits = limits_of(summaries, config.max_perplexity, config.max_repetition)
    recommendation, reason = None, f"the reward {chosen_by!r} has no value at any λ."
    if any(row["rewards"][chosen_by] is not None for row in rows if row["arm"] == LOGITS):
        try:
            recommendation = recommend(
                summaries, curve, rule.name, chosen_by, rule.kl_budget, first.beta, rule.radius, config.prompts_differ,
                standard_errors=rule.standard_errors, limits=limits,
                gold=None if config.gold is None else (names[0], config.gold),
            )  # fmt: skip
            reason = None
        except DeRaError as error:  # there is still all that was measured to be shown
            reason = str(error)
    resamples = resamples_of(rows, config.group, config.seed)
    best = best_arm(summaries, curve, rule, chosen_by, limits, resamples)
    return Analysis(rows, summaries, curve, recommendation, reason, best)


def with_decoded(chosen: Analysis, now: Analysis) -> Analysis:
    """
    The choice as it was made, with what was measured at λ* since: its rows are among those of `now`.

    The choice itself is not made again: another one would have to be decoded in its turn.
    """
    recommendation = chosen.recommendation
    assert recommendation is not None
    (summary,) = (s for s in now.summaries if (s.arm, s.lam) == (LOGITS, recommendation.lam))
    reward = summary.rewards[recommendation.reward]
    pair = reward.versus.get(recommendation.against) if recommendation.against is not None else None
    decoded = Decoded(reward.level, summary.kl, None if pair is None else pair.difference)
    return replace(now, recommendation=replace(recommendation, decoded=decoded), reason=None, best=chosen.best)


def finish(
    worker: SweepWorker,
    rewards: Sequence[NamedReward],
    judge: NamedJudge | None,
    found: Analysis,
    reused: int,
) -> SweepResult:
    """Writes the files of a sweep."""
    config, folder, first = worker.config, worker.folder, worker.arms[0]
    recommendation, best, command = found.recommendation, found.best, None
    if recommendation is not None:
        if recommendation.beta is not None and recommendation.lam != 1:
            command = retrain_command(first.adapter, first.record, recommendation.beta, folder)
        use = commands(config, first, recommendation.lam, worker.prompts)
        recommendation = replace(recommendation, use=use, retrain=command)
    if best is not None:
        arm = next(arm for arm in worker.arms if arm.name == best.best.arm)
        best = replace(best, use=arm.use(best.best.lam))

    aligned = first.record.aligned
    adapter = first.adapter if len(aligned) == 1 else " and ".join(aligned)
    findings = Findings(
        found.summaries, found.curve, recommendation, found.reason, best,
        adapter=adapter if first.record.branches_differ else "the principle",
        models={arm.name: arm.place for arm in worker.arms if not arm.is_own},
        ways={arm.name: _way(arm) for arm in worker.arms[1:]},
        benchmarks=_benchmarks(folder, first),
    )  # fmt: skip
    title = f"{findings.adapter}: {len(worker.prompts)} prompts, {config.samples} samples each; bars: 95 % over prompts"
    shown = recommendation.reward if recommendation is not None else rewards[0].name
    for ending in ("png", "svg"):
        plot_sweep(findings, shown, folder / f"sweep.{ending}", title)
        plot_pareto(findings, shown, folder / f"pareto.{ending}", title)
    lines = ({name: value for name, value in row.items() if name not in IN_MEMORY} for row in found.rows)
    write_atomically(folder / "samples.jsonl", "".join(dumps(line) + "\n" for line in lines))
    write_csv(found.summaries, folder / "summary.csv")
    of_recommendation = None if recommendation is None else recommendation.to_dict()
    of_best = None if best is None else best.to_dict()
    told = {"recommendation": of_recommendation, "no_recommendation": found.reason, "best_arm": of_best}
    write_atomically(folder / RECOMMENDATION, json.dumps(told, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    title = f"How strong should {findings.adapter} be?"
    write_report(folder / "report.html", title, _facts(worker, rewards, judge), findings, found.rows)
    failed = sum("errors" in row for row in found.rows)
    files = [*FILES, RETRAIN] if command is not None and RETRAIN in command else list(FILES)
    return SweepResult(
        found.summaries, found.curve, recommendation, found.reason, best, command, found.rows, reused, failed, files
    )


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
            "guards": {
                "log_perplexity": None if (value := perplexity(measured)) is None else math.log(value),
                "repetition": repetition(measured.tokens),
            },
        }
        if errors:
            row["errors"] = errors
        if judge is not None:
            row["judged"] = {lam: verdict.value for lam, verdict in judged.items()}
        in_memory = {name: getattr(score, name) for name in OF_SCORES}
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


def _benchmarks(folder: Path, arm: Arm) -> dict[str, list[BenchmarkRow]]:
    """Those that `dera lm-eval` left in the folder, of the arm's model as it is now."""
    if not (folder / benchmarks.FILE).exists():
        return {}
    return benchmarks.by_line(benchmarks.read_benchmarks(folder, benchmarks.model_fingerprint(arm.record)))


def _way(arm: Arm) -> str:
    beta = "" if arm.is_own or arm.beta is None else f" (β = {arm.beta:g})"
    return f"{arm.ways}{beta}"


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
    if worker.arms[1:]:
        facts["arms beside plain λ"] = ", ".join(arm.name for arm in worker.arms[1:])
    if sampling.temperature not in (0, 1):
        facts["KL and perplexity"] = "at temperature 1, along samples that were drawn at the temperature above"
    return facts | {
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        "date": date.today().isoformat(),
    }
