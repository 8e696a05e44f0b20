"""
Logs of rows: .jsonl files that survive an interruption, a typed row a line, each written as soon as it is finished.

Nothing here imports torch: what reads results need not wait for it.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from dera_peft.decoding.chats import Chat
from dera_peft.decoding.lambdas import Lambda, NamedLambda, is_lambda
from dera_peft.decoding.prompts import Prompt
from dera_peft.decoding.requests import Completion, Request, read_rule_of
from dera_peft.errors import DeRaError
from dera_peft.files import check_writable, told_if_unwritable
from dera_peft.formatting import short_repr
from dera_peft.settings import alternatives, type_hints

JSON_NAMES = {"lam": "lambda"}  # fields that JSON calls otherwise: `lambda` is a keyword of Python


@dataclass(frozen=True)
class GeneratedRow:
    """
    A completion of `dera generate`.

    Attributes:
        run: fingerprint of the settings that it was made with, the first field of every row.
        prompt_index: the place of its prompt in the list of prompts, from 0.
        prompt, columns: of its prompt: the text or chat, and the further columns of its row.
        lam: λ, of several adapters all of them by name; None where there are no branches that differ.
        sample: its number among the completions of its prompt and λ, from 0.
        num_tokens: with the end token if there is one.
        finish_reason: "eos" if the model ended it, "length" if the limit of tokens did.
        token_ids: as they were drawn, the end token included.
        end_token_id: the end token's; None without one.
        combine: the rule at each token; None for "linear".
        lambda_schedule: position (as JSON has keys, a text) -> λ from there on; None where λ stays.
        token_lambda: the λ that these gave each token; None at plain λ, and of a rule without λ.
        particles, log_z, log_z_error, effective_size, resamplings, ancestors: of an `ExactSample`.
    """

    kind: ClassVar[str] = "results"
    __repr__ = short_repr

    run: str
    prompt_index: int
    prompt: str | Chat
    columns: dict[str, Any]
    lam: Lambda | None
    sample: int
    completion: str
    num_tokens: int
    finish_reason: str
    token_ids: list[int]
    end_token_id: int | None
    combine: str | None = field(default=None, kw_only=True)
    lambda_schedule: dict[str, float] | None = field(default=None, kw_only=True)
    token_lambda: list[float] | None = field(default=None, kw_only=True)
    particles: int | None = field(default=None, kw_only=True)
    log_z: float | None = field(default=None, kw_only=True)
    log_z_error: float | None = field(default=None, kw_only=True)
    effective_size: float | None = field(default=None, kw_only=True)
    resamplings: int | None = field(default=None, kw_only=True)
    ancestors: int | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, run: str, completion: Completion, prompt: Prompt, **values):
        """The row of a decoded completion; `values` are the further fields of a subclass."""
        request, exact = completion.request, completion.exact
        of_particles = {} if exact is None else {k: v for k, v in vars(exact).items() if k != "tokens"}
        return cls(
            run=run,
            prompt_index=prompt.index,
            prompt=prompt.content,
            columns=prompt.columns,
            lam=request.lam,
            sample=request.sample,
            completion=completion.text,
            num_tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            token_ids=completion.tokens,
            end_token_id=completion.end_token_id,
            **request.rule,
            token_lambda=completion.token_lambda,
            **of_particles,
            **values,
        )

    @property
    def request(self) -> Request:
        return Request(self.prompt_index, self.lam, self.sample, *read_rule_of(self.combine, self.lambda_schedule))


@dataclass(frozen=True)
class RewardedRow(GeneratedRow):
    """A completion with its reward; None where the reward gave it none."""

    __repr__ = short_repr

    reward: float | None


@dataclass(frozen=True)
class ScoredRow:
    """
    What `dera score` says of one completion at one λ, in nats; null for a number that is not finite.

    Attributes:
        prompt_index: the place of the completion's row in its file, from 0; of a preference pair n, from 0, that is 2n
            for chosen and 2n+1 for rejected.
        num_tokens: that were scored.
        log_p: log p_λ(completion | prompt); per_token is its mean over the tokens.
        kl: KL(π_λ ‖ π_ref) along the completion.
        columns: of its row that its prompt was rendered with, where there are any.
        token_ids, token_texts, token_log_p, token_kl, token_disagreement: for each token, where they were asked for.
        combine, lambda_schedule: as of a `GeneratedRow`.
        token_lambda: the λ that these gave each token, where it was asked for; None as of a `GeneratedRow`.
        of_pair: of a preference pair "chosen" or "rejected".
    """

    kind: ClassVar[str] = "scores"
    __repr__ = short_repr

    run: str
    prompt_index: int
    prompt: str | Chat
    completion: str
    lam: Lambda
    num_tokens: int
    log_p: float | None
    per_token: float | None
    perplexity: float | None
    kl: float | None
    columns: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    token_texts: list[str] | None = None
    token_log_p: list[float | None] | None = None
    token_kl: list[float | None] | None = None
    token_disagreement: list[float | None] | None = None
    combine: str | None = None
    lambda_schedule: dict[str, float] | None = None
    token_lambda: list[float | None] | None = None
    of_pair: str | None = None


Row = TypeVar("Row")


def to_json(row: Any) -> dict[str, Any]:
    """A row as a JSON object; a field that still has its default, None, is left out."""
    values = {each.name: getattr(row, each.name) for each in fields(row)}
    optional = {each.name for each in fields(row) if each.default is not MISSING}
    return {
        JSON_NAMES.get(name, name): values[name] for name in values if name not in optional or values[name] is not None
    }


def from_json(row_type: type[Row], values: Mapping[str, Any]) -> Row:
    """The row of a JSON object. Raises `TypeError` where a field is missing, not known, or of another type."""
    names = {json_name: name for name, json_name in JSON_NAMES.items()}
    values = {names.get(name, name): value for name, value in values.items()}
    if isinstance(values.get("lam"), dict):
        if not values["lam"] or not all(map(is_lambda, values["lam"].values())):
            raise TypeError("lam is not a number for each name")
        values["lam"] = NamedLambda(values["lam"])
    row = row_type(**values)
    for name, hint in type_hints(row_type).items():
        if get_origin(hint) is not ClassVar and not _has_type(getattr(row, name), hint):
            raise TypeError(f"{name} is not {hint}")
    return row


def _has_type(value: Any, hint: Any) -> bool:
    """Whether JSON's value has a type; a float may be written as an integer."""
    kinds = alternatives(hint)
    if len(kinds) > 1:
        return any(_has_type(value, kind) for kind in kinds)
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return True
    if origin is list:
        if not isinstance(value, list):
            return False
        one_of_each = {type(each): each for each in value}  # of numbers and texts it is enough, and quick
        return all(
            _has_type(each, parts[0]) for each in (value if {list, dict} & {*one_of_each} else one_of_each.values())
        )
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(each, parts[1]) for each in value.values())
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return isinstance(value, origin)


def to_line(row: Any) -> str:
    return dumps(to_json(row))


def dumps(values: Mapping[str, Any]) -> str:
    """JSON of a row. A λ by name is an object; of what JSON doesn't have, as a dataset's dates, the text."""
    return json.dumps(
        values, ensure_ascii=False, default=lambda value: dict(value) if isinstance(value, NamedLambda) else str(value)
    )


@dataclass(frozen=True)
class Expected:
    """
    What this run would put into a row: an earlier row that differs is of other settings or inputs.

    Attributes:
        source: where the inputs stand, for messages.
        inputs: values of the row's fields, by name.
        input_name: what they are called in messages.
        run: fingerprint of the settings, where rows of one file have several; and `run_name`, what has these settings.
    """

    source: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    input_name: str = "prompts"
    run: str | None = None
    run_name: str = ""


def expect_prompts(prompts: Sequence[Prompt]) -> Callable[[GeneratedRow], Expected | None]:
    """For `RowLog`: a row has the text and the columns (which a reward may have read) of its prompt."""

    def expected(row: GeneratedRow) -> Expected | None:
        if row.prompt_index >= len(prompts):
            return None
        prompt = prompts[row.prompt_index]
        return Expected(prompt.source, {"prompt": prompt.content, "columns": prompt.columns})

    return expected


class RowLog(Generic[Row]):
    """
    A .jsonl file of rows that a run appends to and a later run continues.

    Each of several processes appends to a file of its own and reads the files of all. A last line that an interruption
    tore is cut off the process's own file. A file that is damaged elsewhere, or that has rows of other settings or
    inputs, is an error and stays as it is.

    Args:
        file: of this process. It is made with the first rows; that it can be written is checked at once.
        row_type: a frozen dataclass with `run` as its first field and `kind`, what its rows are called in messages.
        run: fingerprint that all rows must have; None where they have several.
        expected: from a row to what this run would put there, or None where it makes no such row.
        pattern: of the names of all processes' files, in the folder of `file`; by default there is that file alone.
        argument: what names the file for the user, for messages.
        output: what the user has to move away where the rows are of another run: the file, or the folder that it is in.

    Attributes:
        rows: of all the files.

    Raises:
        DeRaError: rows are of another run, an earlier version or damaged, or a file can't be read or written.
    """

    def __init__(
        self,
        file: str | os.PathLike,
        row_type: type[Row],
        run: str | None = None,
        *,
        expected: Callable[[Row], Expected | None] | None = None,
        pattern: str | None = None,
        argument: str = "output_dir",
        output: str | os.PathLike | None = None,
    ):
        self.file = Path(file)
        self.output = self.file if output is None else Path(output)
        self.rows: list[Row] = []
        check_writable(self.file, argument)
        files = sorted(self.file.parent.glob(pattern)) if pattern else [self.file]
        own_torn = b""
        for each in files:
            if each.exists() and not each.is_file():  # a device, or a pipe, holds no rows
                continue
            try:
                rows, torn = read_rows(each, row_type)
            except FileNotFoundError:  # it is not made yet; or another process has only checked that it can write it
                continue
            self.rows += rows
            if each == self.file:
                own_torn = torn
        for row in self.rows:
            _check_row(row, run, expected(row) if expected else None, self.output)
        cut_torn(self.file, own_torn, '{"run": "' if run is None else json.dumps({"run": run})[:-1])

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Writes rows as whole lines, at once; returns them. Raises `DeRaError` where they can't be written."""
        rows = list(rows)
        lines = "".join(to_line(row) + "\n" for row in rows).encode("utf-8")
        # one call, so that no line of another process comes between
        with told_if_unwritable(self.file), self.file.open("ab", buffering=0) as stream:
            while lines:
                lines = lines[stream.write(lines) :]
        self.rows += rows
        return rows


def read_rows(file: Path, row_type: type[Row]) -> tuple[list[Row], bytes]:
    """
    The rows of a file, and what an interruption left of a line behind them.

    Raises:
        DeRaError: a line is not such a row.
        FileNotFoundError: there is no such file.
    """
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        if not line.strip():  # as an editor leaves one at the end
            continue
        try:
            values = json.loads(line)
            rows.append(from_json(row_type, values))
        except (ValueError, AttributeError, TypeError):
            what = "is not a row of results"
            if is_old_form(line):
                what = "is of an earlier version, whose rows had 'index', 'tokens' and 'finish'"
            raise DeRaError(
                f"{str(file)!r}, line {number}, {what}: move the file away or name another output."
            ) from None
    return rows, torn


def is_old_form(line: bytes) -> bool:
    """Whether a line is a row as an earlier version wrote them."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and {"run", "index", "lambda"} <= values.keys() and "prompt_index" not in values


def cut_torn(file: Path, torn: bytes, beginning: str) -> None:
    """
    Drops the last line, torn by an interruption, if it can have been such a row; any other file stays as it is.

    Of several processes that have read the same file the first one cuts it.

    Args:
        torn: from `read_rows`.
        beginning: of every row.
    """
    if not torn.startswith(beginning.encode()[: len(torn)]):
        raise DeRaError(
            f"{str(file)!r} does not end with a row of these results: move the file away or name another output."
        )
    if torn:
        with file.open("r+b") as stream:
            whole = max(0, stream.seek(0, os.SEEK_END) - len(torn))
            stream.seek(whole)
            if stream.read() == torn:
                stream.truncate(whole)


def _check_row(row: Any, run: str | None, expected: Expected | None, output: Path) -> None:
    """Raises `DeRaError` where a row is of other settings or other inputs than this run's."""
    holds = f"{str(output)!r} holds the {row.kind} of other"
    way_out = "move it away or name another output."
    run_name = ""
    if run is None and expected is not None:
        run, run_name = expected.run, expected.run_name
    if run is not None and row.run != run:
        raise DeRaError(f"{holds} settings ({run_name}run {row.run}, this one is {run}): {way_out}")
    if expected is None:
        return
    for name, value in expected.inputs.items():
        if name == "columns":
            before, now = _json_values(row.columns or {}), _json_values(value)
            for column in sorted(before.keys() | now.keys()):
                if before.get(column) != now.get(column):
                    raise DeRaError(
                        f"{holds} columns: {column!r} was {before.get(column, 'not there')}, and {expected.source} has "
                        f"{now.get(column, 'none')}: {way_out}"
                    )
        elif getattr(row, name) != value:
            raise DeRaError(
                f"{holds} {expected.input_name}: {getattr(row, name)!r}, where {expected.source} is {value!r}: "
                f"{way_out}"
            )


def _json_values(columns: Mapping[str, Any]) -> dict[str, str]:
    """Each as JSON, in which NaN is NaN, and a date the text that `to_line` makes of it."""
    return {name: json.dumps(value, sort_keys=True, ensure_ascii=False, default=str) for name, value in columns.items()}
