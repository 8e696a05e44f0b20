"""`dera score`: prompts and completions in, what each completion is worth at each λ out."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.chats import CONTEXT
from dera_peft.decoding.jsonl import parse_row
from dera_peft.decoding.lambdas import lambdas_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.prompts import Prompt, is_utf8
from dera_peft.decoding.rows import Expected, RowLog, ScoredRow, to_line
from dera_peft.errors import DeRaError
from dera_peft.settings import Check, part, setting, setting_like

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from dera_peft.decoding.scoring import Scored

ENDS: dict[str | None, bool] = {"eos": True, "length": False}  # whether the model ended it, by a row's "finish_reason"
DIGITS = 6  # of nats, in rows

logger = logging.getLogger(__name__)

Key = tuple[int, float]  # of a row: which completion, at which λ


@dataclass(frozen=True)
class Given:
    """
    A completion to be scored.

    Attributes:
        finish_reason: "eos" or "length", as in the rows of `dera generate`; None where the row does not say.
        num_tokens: how many it had when it was decoded, the end token included; None where the row does not say.
    """

    prompt: Prompt
    completion: str
    finish_reason: str | None
    num_tokens: int | None


def read_completions(file: str) -> list[Given]:
    """
    The rows of a .jsonl file, each with a "prompt" (a text or chat messages) and a "completion" (a text), and perhaps
    what the prompt is rendered with (`chats.CONTEXT`), by itself or in "columns" as `dera generate` writes it.

    Raises:
        DeRaError: no such file, or a row that is malformed, with its line.
    """
    given = []
    try:
        with Path(file).open(encoding="utf-8-sig") as stream:  # a byte order mark is no part of the first row
            for number, line in enumerate(stream, start=1):
                given.append(_read_row(line, number - 1, f"{file}, line {number}"))
    except FileNotFoundError:
        raise DeRaError(f"--completions: {file!r}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeRaError(f"--completions: {file!r} can't be read: {error}") from None
    if not given:
        raise DeRaError(f"--completions: {file!r} has no rows in it.")
    return given


def _read_row(line: str, index: int, source: str) -> Given:
    row = parse_row(line, source)
    for key in ("prompt", "completion"):
        if key not in row:
            raise DeRaError(f"{source}: has no key {key!r}; its keys are {sorted(row)}.")
    if not isinstance(row["completion"], str):
        raise DeRaError(f"{source}: a completion must be a text; got {row['completion']!r}.")
    if not is_utf8(row["completion"]):
        raise DeRaError(f"{source}: the completion is not valid UTF-8.")
    if "finish" in row and "finish_reason" not in row:
        raise DeRaError(
            f"{source}: 'finish' is what an earlier version called 'finish_reason': rename the key, or make the "
            "completions again."
        )
    num_tokens = row.get("num_tokens")
    columns = row.get("columns")  # in the rows of `dera generate`
    columns = columns if isinstance(columns, dict) else row
    return Given(
        Prompt(index, row["prompt"], source, columns={name: columns[name] for name in CONTEXT if name in columns}),
        row["completion"],
        row.get("finish_reason"),
        num_tokens if isinstance(num_tokens, int) else None,
    )


def encode_completions(
    given: Sequence[Given],
    prompts: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    config: "PreTrainedConfig",
    end: bool | None,
) -> list[list[int]]:
    """
    Token ids of each completion, by itself, as decoding makes a text of its tokens by themselves.

    Args:
        prompts: token ids of the prompts, with which they must fit into the context.
        end: whether the end token follows each completion; None asks its row.

    Raises:
        DeRaError: a completion is too long, a row's "finish_reason" is not known, or the tokenizer has no end token.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    result = []
    for each, prompt in zip(given, prompts, strict=True):
        source = each.prompt.source
        if end is None and each.finish_reason not in (None, *ENDS):
            raise DeRaError(
                f"{source}: finish_reason={each.finish_reason!r} is neither 'eos' nor 'length': say with --end or "
                "--no-end whether the end token is part of the completions."
            )
        ids = list(tokenizer(each.completion, add_special_tokens=False)["input_ids"])
        if ENDS.get(each.finish_reason, False) if end is None else end:
            if tokenizer.eos_token_id is None:
                raise DeRaError(f"{source}: the tokenizer has no end token to score; pass --no-end.")
            if ids[-1:] != [tokenizer.eos_token_id]:  # it may be written out
                ids.append(tokenizer.eos_token_id)
        length = len(ids) if config.is_encoder_decoder else len(prompt) + len(ids)
        if context is not None and length > context:
            raise DeRaError(
                f"{source}: prompt and completion have {len(prompt)} and {len(ids)} tokens, which is more than the "
                f"model's context of {context}; shorten them."
            )
        result.append(ids)
    return result


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(ModelSource):
    """The settings of `dera score`."""

    completions: str = setting(
        help="A .jsonl file: rows with a 'prompt' (a text or chat messages) and a 'completion' (a text), as those of "
        "dera generate --output.",
        metavar="FILE",
        panel="Prompts",
    )
    lambdas: tuple[float, ...] = lambdas_setting(
        (), "Strengths; the one that dera.json names, else 1, unless given.", "Prompts"
    )
    chat: bool = setting_like(PromptSettings, "chat")
    end: bool | None = setting(
        None,
        "Whether the tokenizer's end token is part of each completion. By default it is of those whose row has "
        "'finish_reason': 'eos'.",
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

    A completion is split into tokens by itself and put behind its prompt's, which is how it was decoded.

    **Examples**

    `dera score --adapter ./dpo --completions out.jsonl --lambda 0,0.25,0.5,0.75,1`

    `dera score --adapter ./dpo --completions chats.jsonl --chat --end --lambda 0,1 --output scores.jsonl`
    """
    from rich.console import Console

    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.decoding.prompts import encode
    from dera_peft.decoding.scoring import score_each
    from dera_peft.model import DeRaModel
    from dera_peft.progress import show_progress

    given = read_completions(settings.completions)
    source = part(settings, ModelSource).placed()
    record = source.resolve_one("dera score", "use dera_peft.evaluate.score with lam by name.")
    lambdas = settings.lambdas or (cast("float", record.lam),)  # of one aligned branch it is one number
    run = settings_fingerprint(
        {
            **source.fingerprint(),
            "chat": settings.chat,
            "end": settings.end,
            "temperature": settings.temperature,
            "per_token": settings.tokens,
        }
    )
    output = settings.output
    log = None
    if output is not None:
        log = RowLog(output, ScoredRow, run, expected=lambda row: _expected(row, given), argument="--output")
    finished: dict[Key, ScoredRow] = {(row.prompt_index, row.lam): row for row in log.rows} if log else {}
    wanted = [(index, lam) for index in range(len(given)) for lam in lambdas]
    missing: dict[tuple[float, ...], list[int]] = defaultdict(list)  # all but a torn one lack all λ, or the new ones
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
        prompts = encode([each.prompt for each in given], tokenizer, base_config, 1, settings.chat)
        completions = encode_completions(given, prompts, tokenizer, base_config, settings.end)
        _tell_of_other_splits(given, completions, settings.end)
        model = DeRaModel.from_source(source)
        with show_progress("scoring", len(wanted), done) as advance:
            for lacks, indices in missing.items():
                of = [prompts[index] for index in indices], [completions[index] for index in indices]
                for place, scored in score_each(model, *of, list(lacks), settings.temperature):
                    index = indices[place]
                    ids = completions[index] if settings.tokens else None
                    rows = _rows(run, given[index], scored, lacks, ids, tokenizer)
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


def _tell_of_other_splits(given: Sequence[Given], completions: Sequence[Sequence[int]], end: bool | None) -> None:
    """A sampled text need not have been made of the tokens that the tokenizer splits it into."""
    if end is not None:
        return
    counts = [(each.num_tokens, len(ids)) for each, ids in zip(given, completions, strict=True)]
    counts = [(before, now) for before, now in counts if before is not None]
    if other := sum(before != now for before, now in counts):
        logger.warning(
            f"{other} of {len(counts)} completions are split into another number of tokens than they were decoded "
            "with: their texts are scored as the tokenizer splits them"
        )


def _rows(
    run: str, given: Given, scored: "Scored", lambdas: Sequence[float], ids: list[int] | None, tokenizer: Any
) -> list[ScoredRow]:
    """A row for each λ; with the values of each token if its `ids` are given."""
    rows = []
    for place, lam in enumerate(lambdas):
        of_tokens: dict[str, list] = {}
        if ids is not None:
            of_tokens["token_ids"] = ids
            of_tokens["token_texts"] = [tokenizer.decode([token]) for token in ids]
            of_tokens["token_log_p"] = [_number(value) for value in scored.log_p[place]]
            of_tokens["token_kl"] = [_number(value) for value in scored.kl[place]]
            if scored.disagreement is not None:
                of_tokens["token_disagreement"] = [_number(value) for value in scored.disagreement]
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
                **of_tokens,
            )
        )
    return rows


def _number(value: Any) -> float | None:
    """JSON has no infinity and no NaN."""
    value = float(value)
    return round(value, DIGITS) if math.isfinite(value) else None


def table(lambdas: Sequence[float], rows: Mapping[Key, ScoredRow]) -> "Table":
    """For each λ the means over the completions, and over all of their tokens."""
    from rich.table import Table

    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("λ", "completions", "tokens", "log p", "per token", "perplexity", "KL (nats)"):
        result.add_column(name, justify="right", no_wrap=True)
    for lam in lambdas:
        of = [row for (_, each), row in rows.items() if each == lam]
        tokens = sum(row.num_tokens for row in of)
        total = sum(_value(row.log_p) for row in of)
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
    for row in rows:
        print(to_line(row), flush=True)
