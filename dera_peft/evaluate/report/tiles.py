"""The few numbers at what is recommended that a reader looks at first."""

from dataclasses import dataclass, replace

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import exponential
from dera_peft.evaluate.points import anchor_name, is_as_trained
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.tables import Cell, decimals, estimate_cell

FLUENCY = "perplexity per token under the reference: low is fluent"
VERDICTS = {True: "these prompts show it", False: "these prompts can't tell the two apart", None: ""}


@dataclass(frozen=True)
class Tile:
    """
    Attributes:
        name: of the number.
        cell: it, with its 95 % interval.
        note: what else tells what it means.
    """

    name: str
    cell: Cell
    note: str


def tiles(findings: Findings) -> list[Tile]:
    """Reward, difference to λ=1, KL and fluency at the recommended plain λ."""
    found = findings.recommendation
    if found is None:
        return []
    measured = found.decoded or found
    made = [
        Tile(found.reward, _cell(measured.value, "+"), f"mean over prompts{found.where}"),
        _to_trained(findings),
        Tile("KL to the reference", _cell(measured.kl), "nats a completion"),
        _fluency(findings, LOGITS, found.lam),
    ]
    if found.gold is not None:
        parts = "" if found.gold.parts_from is None else f"; falls from λ={found.gold.parts_from:g} on"
        note = f"mean over prompts; the gold reward, highest at λ={found.gold.turn:g}{parts}"
        made.insert(1, Tile(found.gold.gold, _cell(found.gold.value, "+"), note))
    return made


def tiles_of_arm(findings: Findings) -> list[Tile]:
    """The same of the best of all arms, compared with the best plain λ; none where plain λ is the best."""
    best = findings.best
    if best is None or best.is_plain:
        return []
    of_plain = "the best plain λ" if best.plain is None else f"the best plain λ, {best.plain.lam:g}"
    return [
        Tile(best.reward, _cell(best.best.value, "+"), "mean over prompts"),
        Tile(f"Difference to {of_plain}", _cell(best.difference, "+"), VERDICTS[best.distinguishable]),
        Tile("KL to the reference", _cell(best.best.kl), "nats a completion"),
        _fluency(findings, best.best.arm, best.best.lam),
    ]


def _cell(estimate: Estimate | None, sign: str = "") -> Cell:
    return estimate_cell(estimate, 3 if estimate is None else decimals(abs(estimate.mean)), sign)


def _to_trained(findings: Findings) -> Tile:
    found = findings.recommendation
    assert found is not None
    against = found.against
    name = f"Difference to {anchor_name(against) if isinstance(against, NamedLambda) else 'λ=1, as trained'}"
    if is_as_trained(found.lam):
        return Tile(name, Cell("0"), "that is λ=1 itself")
    if found.difference is None:
        return Tile(name, Cell("–"), "λ=1 was not measured")
    # the mean as the tables have it, with an interval that knows that λ was chosen
    difference = found.difference if found.decoded is None else found.decoded.difference or found.difference
    of_choice = found.out_of_bag_difference
    if of_choice is not None:
        difference = replace(difference, low=of_choice.low, high=of_choice.high)
    return Tile(name, _cell(difference, "+"), VERDICTS[found.distinguishable])


def _fluency(findings: Findings, arm: str, lam: Lambda | None) -> Tile:
    measured = {(s.arm, s.lam): s.perplexity for s in findings.summaries}
    found = measured.get((arm, lam))
    if found is None and arm == LOGITS and findings.curve is not None:
        logs = {point.lam: point.guards.get("log_perplexity") for point in findings.curve.points}
        log = None if lam is None else logs.get(lam)
        found = None if log is None else exponential(log)
    if found is None:
        return Tile("Fluency", Cell("–"), "not measured")
    ends = [
        f"λ={end:g} has {_cell(measured[LOGITS, end]).text}"
        for end in (0.0, 1.0)
        if measured.get((LOGITS, end)) is not None and (LOGITS, end) != (arm, lam)
    ]
    return Tile("Fluency", _cell(found), "; ".join([FLUENCY, *ends]))
