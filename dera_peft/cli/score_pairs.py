"""`dera score --pairs`: does the implicit reward at λ tell the better of two completions?"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.score_rows import Key, ScoreSettings, score_rows, strengths
from dera_peft.decoding.completions import Given
from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.decoding.prompts import Prompt
from dera_peft.errors import DeRaError
from dera_peft.settings import part

if TYPE_CHECKING:
    from dera_peft.evaluate.margins import BestMargin, Margins

logger = logging.getLogger(__name__)


def score_pairs(settings: ScoreSettings) -> None:
    from rich.console import Console

    from dera_peft.cli.console import print_json
    from dera_peft.cli.sweep_tables import tables
    from dera_peft.evaluate.arms import beta_of
    from dera_peft.evaluate.calibration import plot_calibration
    from dera_peft.evaluate.margins import best_margin, margins_of
    from dera_peft.evaluate.points import DEFAULT

    source = part(settings, ModelSource)
    record = source.resolve()
    several = len(record.aligned) > 1
    if several and not settings.lambdas:
        raise DeRaError("--lambda is missing: of several adapters say at which points, as --lambda a=1 --lambda b=1.")
    lambdas = sorted(strengths(settings, () if several else DEFAULT), key=values_of)
    beta = beta_of(record) if settings.beta is None else settings.beta
    if beta is None:
        raise DeRaError("--beta is missing: the adapter has no dera.json with the β of its training, give it.")
    given = read_pairs(settings)
    zero = NamedLambda(dict.fromkeys(record.aligned, 0.0)) if several else 0.0
    rows = score_rows(settings, given, list(dict.fromkeys([zero, *lambdas])))
    log_p: dict[Key, float] = {}
    for key, row in rows.items():
        if row.log_p is None:
            raise DeRaError(f"{given[key[0]].prompt.source}: log π_λ at λ={key[1]:g} is not a finite number.")
        log_p[key] = row.log_p

    def ratios(lam: Lambda, side: int) -> list[float]:
        return [log_p[index, lam] - log_p[index, zero] for index in range(side, len(given), 2)]

    log_ratios = {lam: (ratios(lam, 0), ratios(lam, 1)) for lam in lambdas}
    prompts = [json.dumps(each.prompt.content, sort_keys=True) for each in given[::2]]
    found = margins_of(log_ratios, prompts, beta)
    if settings.json:
        for each in found:
            print_json(json.dumps({**each.to_dict(), "beta": beta}, ensure_ascii=False, allow_nan=False))
    else:
        console = Console()
        for table in tables([f"{each.lam:g}" for each in found], columns(found), console.width):
            console.print(table)
            console.print()
        for sentence in sentences(found, [best_margin(found, by) for by in ("accuracy", "log_loss")], beta):
            console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    picture = settings.plot
    if picture is None and settings.output is not None:
        picture = settings.output.with_suffix(".png")
    if picture is not None:
        plot_calibration(found, beta, picture)
        logger.info(f"{picture}: how well the margins are calibrated")
    elif not settings.json:
        Console().print("A picture of their calibration: --plot calibration.png", highlight=False, markup=False)


def read_pairs(settings: ScoreSettings) -> list[Given]:
    """
    Chosen and rejected of each pair, one behind the other, each with an end token; the pair's prompt is that of both.

    Raises:
        DeRaError: there are no pairs that can be scored. Those that can't, of several, are left out with a warning.
    """
    from dera_peft.decoding.chats import TEMPLATE_ARGUMENTS, TOOLS
    from dera_peft.decoding.datasets import read_dataset
    from dera_peft.training.preference_rows import CHOSEN, REJECTED, PreferenceReader
    from dera_peft.training.rows import UnusableError

    assert settings.pairs is not None
    dataset = read_dataset(settings.pairs, settings.split, argument="--pairs")
    if missing := [name for name in (CHOSEN, REJECTED) if name not in dataset.column_names]:
        raise DeRaError(
            f"--pairs: {settings.pairs!r} has no column {missing[0]!r}; it has {sorted(dataset.column_names)}."
        )
    reader = PreferenceReader(dataset.column_names, part(settings, ModelSource).tokenizer())
    given: list[Given] = []
    faults: Counter[str] = Counter()
    for number, row in enumerate(dataset):
        where = f"{settings.pairs}, pair {number + 1}"
        try:
            read = reader(dict(row)).columns
            answers = [_answer(read[side]) for side in (CHOSEN, REJECTED)]
        except UnusableError as error:
            faults[error.args[0]] += 1
            continue
        columns = {TOOLS: read["tools"], TEMPLATE_ARGUMENTS: read["chat_template_kwargs"]}
        columns = {name: value for name, value in columns.items() if value}
        given += [
            Given(Prompt(len(given) + side, read["prompt"], where, columns=columns), answer, "eos")
            for side, answer in enumerate(answers)
        ]
    if faults:
        listed = "; ".join(f"{count} {reason}" for reason, count in faults.items())
        logger.warning(f"{settings.pairs}: of {len(dataset)} pairs {faults.total()} are left out: {listed}")
    if not given:
        raise DeRaError(f"--pairs: {settings.pairs!r} has no pairs that can be scored.")
    return given


def _answer(value: Any) -> str:
    from dera_peft.training.rows import UnusableError

    if isinstance(value, str):
        return value
    if len(value) > 1 or value[0].get("tool_calls"):
        raise UnusableError("have answers of several turns, or with tool calls")
    return value[0]["content"]


def columns(found: "Sequence[Margins]") -> list[tuple[str, list[str]]]:
    """Headings, and a cell for each λ."""
    return [
        ("margin", [_text(each.margin, "+.3f") for each in found]),
        ("accuracy", [_text(each.accuracy, ".3f") for each in found]),
        ("log-loss", [_text(each.log_loss, ".3f") for each in found]),
        ("overconfident by", [_text(each.overconfidence, "+.3f") for each in found]),
        ("calibration error", [f"{each.calibration_error:.3f}" for each in found]),
    ]


def _text(estimate: Any, form: str) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def sentences(found: "Sequence[Margins]", best: "Sequence[BestMargin]", beta: float) -> list[str]:
    """What the table says: at which λ pairs are told best, and whether that is more than at λ=1."""
    first = found[0]
    said = [
        f"{first.pairs} pairs of {first.prompts} prompts; in brackets 95 % intervals over prompts. The margin is "
        f"β·log(π_λ/π_ref) of chosen minus rejected, with β={beta:g}."
    ]
    names = {"accuracy": "The accuracy is highest", "log_loss": "The log-loss is least"}
    for each in best:
        told = f"{names[each.by]} at λ={each.lam:g}, {each.value:.3f}"
        difference = each.difference
        if each.lam == 1 or difference is None or math.isnan(difference.low):
            said.append(f"{told}.")
            continue
        verdict = "which these pairs show" if difference.excludes_zero else "which these pairs can't tell from 0"
        said.append(
            f"{told}; against λ=1 that is {difference.mean:+.3f} (95 % interval, the choice of λ included: "
            f"{difference.low:+.3f} to {difference.high:+.3f}), {verdict}."
        )
    return said
