"""`dera score`: prompts and completions in, what each completion is worth at each λ out."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.completions import Given, read_completions
from dera_peft.decoding.lambdas import Lambda, for_adapters, lambdas_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.requests import rule_fields
from dera_peft.decoding.rows import Expected, RowLog, ScoredRow, to_line
from dera_peft.decoding.rule_settings import RuleSettings
from dera_peft.decoding.system_settings import SystemSettings
from dera_peft.lock import hold
from dera_peft.settings import Check, part, setting, setting_like

if TYPE_CHECKING:
    from rich.table import Table

    from dera_peft.decoding.scoring import Scored

DIGITS = 6  # of nats, in rows

logger = logging.getLogger(__name__)

Key = tuple[int, Lambda]  # of a row: which completion, at which λ


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(SystemSettings, RuleSettings, ModelSource):
    """The settings of `dera score`."""

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("lambdas", "lambda_schedule"),)

    completions: str = setting(
        help="A .jsonl file: rows with a 'prompt' (a text or chat messages) and a 'completion' (a text), as those of "
        "dera generate --output.",
        metavar="FILE",
        panel="Prompts",
    )
    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (),
        "Strengths; the one that dera.json names, else 1, unless given. Of several adapters a point is name=λ,name=λ.",
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
    tokens: bool = setting(False, "Also give the values of each token in those lines.")
    json: bool = setting(False, "Print those lines instead of the table.")


def score(settings: ScoreSettings) -> None:
    """Say how probable given completions are at many λ, from one pass: total, per token, perplexity, KL; in nats.

    The tokens of a completion that dera generate has drawn are those that were drawn. Another one is split into tokens
    by itself and put behind its prompt's.

    **Examples**

    `dera score --adapter ./dpo --completions out.jsonl --lambda 0,0.25,0.5,0.75,1`

    `dera score --adapter ./dpo --completions chats.jsonl --chat --end --lambda 0,1 --output scores.jsonl`

    `dera score --adapter ./dpo --completions out.jsonl --lambda 2 --combine kl:0.05 --tokens --json`

    `dera score --adapters helpful=./a --adapters harmless=./b --completions out.jsonl
    --lambda helpful=0.7,harmless=0.3`
    """
    settings.check_paths()
    given = read_completions(settings.completions)
    with hold(settings.output, "--output"):
        _score(settings, given)


def _score(settings: ScoreSettings, given: Sequence[Given]) -> None:
    from rich.console import Console

    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.decoding.completions import encode_completions
    from dera_peft.decoding.scoring import score_each
    from dera_peft.engine.padding import check_have_rows
    from dera_peft.model import DeRaModel
    from dera_peft.progress import show_progress

    source = part(settings, ModelSource).placed()
    source.check_has_adapter("dera score", settings.prompts_differ)
    record = source.resolve()
    aligned = record.aligned
    default = for_adapters([record.lam], aligned, "dera.json")
    lambdas = settings.lambdas_of(for_adapters(settings.lambdas, aligned), default, aligned)
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
    if settings.json:
        _print_rows(finished[key] for key in wanted if key in finished)

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
                    if log:
                        log.append(rows)
                    finished.update({(index, row.lam): row for row in rows})
                    if settings.json:
                        _print_rows(rows)
                    advance(len(rows))
    if not settings.json:
        Console().print(table(lambdas, {key: finished[key] for key in wanted}))


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


def table(lambdas: Sequence[Lambda], rows: Mapping[Key, ScoredRow]) -> "Table":
    """For each λ the means over the completions, and over all of their tokens."""
    from rich.table import Table

    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("λ", "completions", "tokens", "log p", "per token", "perplexity", "KL (nats)"):
        result.add_column(name, justify="right", no_wrap=True)
    for lam in lambdas:
        of = [row for (_, each), row in rows.items() if each == lam]
        tokens = sum(row.num_tokens for row in of)
        total = sum(-math.inf if row.log_p is None else row.log_p for row in of)  # by a rule, a token may be left out
        divergence = sum(_value(row.kl) for row in of)
        per_token = total / tokens if tokens else math.nan
        result.add_row(
            f"{lam:g}",
            str(len(of)),
            str(tokens),
            f"{total / len(of):.2f}",
            f"{per_token:.4f}",
            f"{_exp(-per_token):.4g}",
            f"{divergence / len(of):.2f}",
        )
    return result


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _print_rows(rows: Iterable[ScoredRow]) -> None:
    from dera_peft.cli.console import print_json

    for row in rows:
        print_json(to_line(row))
