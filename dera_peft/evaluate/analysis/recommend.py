"""Which λ to use, by a stated rule, and the β to retrain at."""

from collections.abc import Sequence
from typing import cast

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.choice import (
    OF_PROMPTS,
    Candidate,
    Rule,
    candidates,
    choose,
    difference_of_draws,
    other_choices,
)
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.gold import gold_result
from dera_peft.evaluate.analysis.guards import Limit, results_of
from dera_peft.evaluate.analysis.recommendation import Recommendation
from dera_peft.evaluate.analysis.resamples import Estimate, left_out_estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary
from dera_peft.evaluate.config import STANDARD_ERRORS
from dera_peft.evaluate.points import is_as_trained


def recommend(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: str,
    reward: str,
    kl_budget: float | None = None,
    beta: float | None = None,
    radius: float | None = None,
    prompts_differ: bool = False,
    *,
    standard_errors: float = STANDARD_ERRORS,
    limits: Sequence[Limit] = (),
    gold: tuple[str, str] | None = None,
) -> Recommendation:
    """
    λ* among the measured λ of the arm "logits" and those that the curve knows between them; never beyond.

    It is the smallest λ within the rule's standard errors of the best. `out_of_bag_value` and `out_of_bag_difference`
    know that it was chosen, `value` and `difference` do not.

    Args:
        summaries: of the sweep.
        curve: its estimates between the measured λ, if there are any. They are of all prompts together: "worst_group"
            and "robust" take a measured λ.
        rule, kl_budget, radius, standard_errors: as in `choice.Rule`.
        reward: name of the reward that the rule looks at.
        beta: β of the adapter, if its record has it.
        prompts_differ: whether the branches have prompts of their own: λ then stands for no training.
        limits: of guards; λ beyond them are passed over.
        gold: the names of the trained reward and of a held-out one, to be compared.

    Raises:
        DeRaError: no such rule or reward; a rule without what it needs; no λ that fits.
    """
    own = [summary for summary in summaries if summary.arm == LOGITS]
    by = Rule(rule, kl_budget, radius, standard_errors)
    check_summaries(own, by, reward)
    among = candidates(own, curve, by, reward)
    choice = choose(among, by, reward, limits)
    chosen, lam = choice.chosen, cast("Lambda", choice.chosen.lam)  # of plain λ
    measured = tuple(cast("Lambda", summary.lam) for summary in own)
    beyond = _beyond(cast("Lambda", choice.best.lam), measured)
    lam_low, lam_high = other_choices(choice) or (None, None)
    alone = [c for c in among if c.lam is not None and is_as_trained(c.lam)]
    as_trained = max(alone, key=lambda c: c.value.mean, default=None)
    clusters = own[0].clusters
    by_itself = None if as_trained is None else left_out_estimate(choice.left_out(as_trained))
    compared = None if gold is None else gold_result(own, curve, *gold, lam)
    notes = _notes(own, curve, rule, reward, {} if choice.indifferent else beyond)
    if gold is not None and compared is None:
        why = "with several adapters there is no single λ along which they could part"
        why = why if isinstance(lam, NamedLambda) else "there is no λ where both have a value"
        notes += (f"{gold[0]!r} and the gold reward {gold[1]!r} are not compared: {why}.",)
    return Recommendation(
        rule=rule,
        reward=reward,
        lam=lam,
        beta=beta / lam if beta is not None and not isinstance(lam, NamedLambda) and lam > 0 else None,
        value=chosen.value,
        group=chosen.group,
        kl=chosen.kl,
        kl_budget=kl_budget if rule == "kl_budget" else None,
        radius=radius if rule == "robust" else None,
        against=None if as_trained is None else as_trained.lam,
        difference=_difference(chosen, as_trained, own, reward, by),
        lam_low=lam_low,
        lam_high=lam_high,
        estimated=chosen.estimated,
        between=any(c.estimated for c in among),
        at_edge=bool(_beyond(lam, measured)),
        indifferent=choice.indifferent,
        measured=measured,
        trained_beta=beta,
        notes=notes,
        prompts_differ=prompts_differ,
        standard_errors=standard_errors,
        best=choice.best,
        lead=choice.lead,
        out_of_bag_value=left_out_estimate(choice.left_out()),
        out_of_bag_difference=by_itself,
        guards=results_of(own, limits),
        gold=compared,
        clusters=clusters,
    )


def check_summaries(own: Sequence[LambdaSummary], rule: Rule, reward: str) -> None:
    """Raises `DeRaError` where there is nothing to choose by."""
    if not own:
        raise DeRaError(f"there is nothing to recommend from: no samples of the arm {LOGITS!r}.")
    if reward not in own[0].rewards:
        raise DeRaError(f"reward={reward!r} is not a reward of this sweep; there are {list(own[0].rewards)}.")
    if rule.name == "worst_group" and not own[0].rewards[reward].groups:
        raise DeRaError("group=None: the rule 'worst_group' needs the column that names the groups.")
    if rule.name == "robust" and own[0].rewards[reward].robust is None:
        raise DeRaError("radius=None: the rule 'robust' needs summaries that were made with a radius.")


def _difference(
    best: Candidate, as_trained: Candidate | None, own: Sequence[LambdaSummary], reward: str, rule: Rule
) -> Estimate | None:
    if as_trained is None:
        return None
    if rule.name not in OF_PROMPTS and not (best.estimated or as_trained.estimated):  # paired sample by sample
        (summary,) = (summary for summary in own if summary.lam == best.lam)
        return summary.rewards[reward].versus[cast("Lambda", as_trained.lam)].difference
    return difference_of_draws(best.value, as_trained.value)


def _beyond(lam: Lambda, measured: Sequence[Lambda]) -> dict[str, list[float]]:
    """
    Where λ is at an edge of what was measured, the next λ beyond it: by adapter, "" for a single one. An adapter of
    several that is not used, at 0, is at no edge.
    """
    beyond = {}
    columns = zip(*map(values_of, measured), strict=True)
    names = lam if isinstance(lam, NamedLambda) else [""]
    for name, value, column in zip(names, values_of(lam), columns, strict=True):
        known = sorted(set(column))
        if value not in (known[0], known[-1]) or len(known) == 1 or (name and value == 0):
            continue
        step = known[0] - known[1] if value == known[0] else known[-1] - known[-2]
        beyond[name] = [value + step, value + 2 * step]
    return beyond


def _notes(
    own: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: str,
    reward: str,
    beyond: dict[str, list[float]],
) -> tuple[str, ...]:
    """`beyond`: λ where nothing was measured, and a better one may lie."""
    notes = []
    if len(own) == 1:
        notes.append("Only one λ was measured: there was nothing to choose from.")
    elif beyond:
        further = "; ".join(
            f"{name or 'λ'} = {', '.join(f'{value:g}' for value in values)}" for name, values in beyond.items()
        )
        first, second = next(iter(beyond.values()))
        of = "" if "" in beyond else f" of {' and '.join(beyond)}"
        side = f", the {'least' if second < first else 'greatest'} λ{of}" if len(beyond) == 1 else f", in the λ{of}"
        notes.append(
            f"The best is at the edge of what was measured{side}: it may lie beyond. Extend the sweep to {further}."
        )
    if curve is not None and rule not in OF_PROMPTS:
        points = [gap.lam for gap in curve.gaps if isinstance(gap.lam, NamedLambda)]
        if points:
            notes.append(
                f"Between {len(points)} pairs of neighbouring points the samples don't tell what all λ give. Points "
                f"between them would, as {points[0]:g}."
            )
        for gap in () if points else curve.gaps:
            notes.append(
                f"Between λ = {gap.low:g} and {gap.high:g} the samples don't tell what all λ give: add λ = {gap.lam:g} "
                "to the sweep."
            )
    failed = sum(summary.rewards[reward].failed for summary in own)
    if failed:
        samples = sum(summary.samples for summary in own)
        notes.append(f"{failed} of {samples} samples have no {reward!r} and were left out.")
    return tuple(notes)
