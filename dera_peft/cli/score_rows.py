"""The settings of `dera score`, and the rows of what it is given: each completion at each λ."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.completions import Given
from dera_peft.decoding.lambdas import Lambda, for_adapters, lambdas_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.requests import rule_fields
from dera_peft.decoding.rows import Expected, RowLog, ScoredRow, to_line
from dera_peft.decoding.rule_settings import RuleSettings
from dera_peft.decoding.system_settings import SystemSettings
from dera_peft.errors import DeRaError
from dera_peft.settings import Check, part, setting, setting_like

if TYPE_CHECKING:
    from dera_peft.decoding.scoring import Scored

DIGITS = 6  # of nats, in rows
PICTURES = (".png", ".svg")
SIDES = ("chosen", "rejected")

logger = logging.getLogger(__name__)

Key = tuple[int, Lambda]  # of a row: which completion, at which λ


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(SystemSettings, RuleSettings, ModelSource):
    """The settings of `dera score`."""

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("lambdas", "lambda_schedule"), ("completions", "pairs"))

    completions: str | None = setting(
        None,
        "A .jsonl file: rows with a 'prompt' (a text or chat messages) and a 'completion' (a text), as those of "
        "dera generate --output.",
        metavar="FILE",
        panel="Prompts",
    )
    pairs: str | None = setting(
        None,
        "Preference pairs in place of completions: rows with chosen and rejected, and the prompt, as dera dpo takes "
        "them; a .jsonl, .json, .csv or .parquet file, a function as path.py:name, or a dataset (hub id or folder). "
        "Told are margin and accuracy of the implicit reward at each λ.",
        metavar="SOURCE",
        panel="Prompts",
    )
    split: str = setting("train", "Split of a dataset of pairs.", metavar="SPLIT", panel="Prompts")
    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (),
        "Strengths; the one that dera.json names, else 1, unless given; of pairs 0,0.25,0.5,0.75,1,1.5,2. Of several "
        "adapters a point is name=λ,name=λ.",
        "Prompts",
    )
    chat: bool = setting_like(PromptSettings, "chat")
    end: bool | None = setting(
        None,
        "Whether an end token is part of each completion. By default it is of those whose row has 'finish_reason': "
        "'eos'.",
        panel="Prompts",
    )
    temperature: float = setting(
        1.0,
        "Divides the mixed logits; the KL is at 1.",
        check=Check(lambda value: value > 0, "more than 0: greedy decoding has no probabilities"),
        metavar="T",
        panel="Sampling",
    )
    output: Path | None = setting(
        None,
        "A .jsonl file: a line per completion and λ, written as it finishes. Run again, it is continued.",
        metavar="FILE",
    )
    beta: float | None = setting(
        None,
        "β of the implicit reward of pairs; that of the training, which the adapter's dera.json has, unless given.",
        check=Check(lambda value: 0 < value < math.inf, "more than 0", names_type=True),
        metavar="β",
        panel="Prompts",
    )
    plot: Path | None = setting(
        None,
        "Of pairs: a picture (.png or .svg) of how well the margins are calibrated; by default beside --output.",
        metavar="FILE",
    )
    tokens: bool = setting(False, "Also give the values of each token in those lines.")
    json: bool = setting(False, "Print those lines instead of the table.")

    def __post_init__(self):
        super().__post_init__()
        if (self.completions is None) == (self.pairs is None):
            raise DeRaError("give --completions FILE, or --pairs SOURCE.")
        if self.pairs is None:
            of_pairs = {"beta": self.beta, "plot": self.plot, "split": self.split if self.split != "train" else None}
            if given := [name for name, value in of_pairs.items() if value is not None]:
                raise DeRaError(f"{given[0]}={of_pairs[given[0]]} is of pairs: give --pairs, or leave it out.")
        elif self.asked is not None:
            raise DeRaError(f"pairs: margins are those of plain λ; leave out {self.asked}.")
        elif self.temperature != 1:
            raise DeRaError(f"pairs: the implicit reward is that at temperature 1; leave out {self.temperature:g}.")
        if self.plot is not None and self.plot.suffix not in PICTURES:
            raise DeRaError(f"plot={str(self.plot)!r} must end with {' or '.join(PICTURES)}.")


def strengths(settings: ScoreSettings, default: Sequence[Any] = ()) -> list[Lambda]:
    """The λ that are asked for; else `default`, or the one that dera.json names."""
    source = part(settings, ModelSource)
    source.check_has_adapter("dera score", settings.prompts_differ)
    record = source.resolve()
    aligned = record.aligned
    named = for_adapters(default or [record.lam], aligned, "dera.json")
    return list(settings.lambdas_of(for_adapters(settings.lambdas, aligned), named, aligned))


def score_rows(settings: ScoreSettings, given: Sequence[Given], lambdas: Sequence[Lambda]) -> dict[Key, ScoredRow]:
    """
    Each completion at each λ; those that the output has are taken from there, and the others are scored and written.

    Of pairs the completions are chosen and rejected by turns.
    """
    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.decoding.completions import encode_completions
    from dera_peft.decoding.scoring import score_each
    from dera_peft.engine.padding import check_have_rows
    from dera_peft.model import DeRaModel
    from dera_peft.progress import show_progress

    source = part(settings, ModelSource).placed()
    rule = rule_fields(settings.combine, settings.schedule)
    run = settings_fingerprint(
        {
            **source.fingerprint(),
            "chat": settings.chat,
            "end": settings.end,
            "temperature": settings.temperature,
            "per_token": settings.tokens,
            **settings.system_prompts(),
        }
    )
    output = settings.output
    log = None
    if output is not None:
        log = RowLog(output, ScoredRow, run, expected=lambda row: _expected(row, given), argument="--output")
    # rows of another rule may stand beside these
    found = [row for row in log.rows if (row.combine, row.lambda_schedule) == tuple(rule.values())] if log else []
    finished: dict[Key, ScoredRow] = {(row.prompt_index, row.lam): row for row in found}
    wanted = [(index, lam) for index in range(len(given)) for lam in lambdas]
    missing: dict[tuple[Lambda, ...], list[int]] = defaultdict(list)  # all but a torn one lack all λ, or the new ones
    for index in range(len(given)):
        if lacks := tuple(lam for lam in lambdas if (index, lam) not in finished):
            missing[lacks].append(index)
    done = sum(key in finished for key in wanted)
    if done:
        logger.info(f"{output}: {done} of {len(wanted)} scores are there already")
    prints = settings.json and settings.pairs is None
    if prints:
        print_rows(finished[key] for key in wanted if key in finished)

    if missing:
        base_config, tokenizer = source.config, source.tokenizer()
        prompts, reference = settings.encode([each.prompt for each in given], tokenizer, base_config, 1, settings.chat)
        ends = source.end_tokens()
        completions = encode_completions(given, prompts, tokenizer, base_config, ends, settings.end)
        model = DeRaModel.from_source(source)
        tokens = {token for sequence in (*prompts, *completions, *(reference or ())) for token in sequence}
        check_have_rows(model, tokens, lambda token: cast("str", tokenizer.decode([token])))
        with show_progress("scoring", len(wanted), done) as advance:
            for lacks, indices in missing.items():
                of = [prompts[index] for index in indices], [completions[index] for index in indices]
                asked = {
                    "combine": settings.combine,
                    "lambda_schedule": settings.lambda_schedule,
                    "reference_prompts": None if reference is None else [reference[index] for index in indices],
                }
                for place, scored in score_each(model, *of, list(lacks), settings.temperature, **asked):
                    index = indices[place]
                    ids = completions[index] if settings.tokens else None
                    rows = _rows(run, given[index], scored, lacks, ids, tokenizer, rule)
                    if settings.pairs is not None:
                        rows = [replace(row, of_pair=SIDES[index % 2]) for row in rows]
                    if log:
                        log.append(rows)
                    finished.update({(index, row.lam): row for row in rows})
                    if prints:
                        print_rows(rows)
                    advance(len(rows))
    return {key: finished[key] for key in wanted}


def _expected(row: ScoredRow, given: Sequence[Given]) -> Expected | None:
    if row.prompt_index >= len(given):
        return None
    now = given[row.prompt_index]
    inputs = {"prompt": now.prompt.content, "columns": now.prompt.columns, "completion": now.completion}
    return Expected(now.prompt.source, inputs, "rows")


def _rows(
    run: str,
    given: Given,
    scored: "Scored",
    lambdas: Sequence[Lambda],
    ids: list[int] | None,
    tokenizer: Any,
    rule: Mapping[str, Any],
) -> list[ScoredRow]:
    """A row for each λ; with the values of each token if its `ids` are given."""
    rows = []
    for place, lam in enumerate(lambdas):
        values: dict[str, Any] = dict(rule)
        if ids is not None:
            values["token_ids"] = ids
            values["token_texts"] = [tokenizer.decode([token]) for token in ids]
            values["token_log_p"] = [_number(value) for value in scored.log_p[place]]
            values["token_kl"] = [_number(value) for value in scored.kl[place]]
            if scored.disagreement is not None:
                values["token_disagreement"] = [_number(value) for value in scored.disagreement]
            if scored.token_lambda is not None and not scored.token_lambda.isnan().any():
                values["token_lambda"] = [_number(value) for value in scored.token_lambda[place]]
        rows.append(
            ScoredRow(
                run=run,
                prompt_index=given.prompt.index,
                prompt=given.prompt.content,
                completion=given.completion,
                lam=lam,
                num_tokens=scored.log_p.shape[1],
                log_p=_number(scored.total[place]),
                per_token=_number(scored.per_token[place]),
                perplexity=_number(scored.perplexity[place]),
                kl=_number(scored.kl[place].sum()),
                columns=given.prompt.columns or None,
                **values,
            )
        )
    return rows


def _number(value: Any) -> float | None:
    """JSON has no infinity and no NaN."""
    value = float(value)
    return round(value, DIGITS) if math.isfinite(value) else None


def print_rows(rows: Iterable[ScoredRow]) -> None:
    from dera_peft.cli.console import print_json

    for row in rows:
        print_json(to_line(row))
