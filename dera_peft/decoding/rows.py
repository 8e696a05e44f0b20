"""Results that survive an interruption: one JSON object a line, written as each is finished."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dera_peft.decoding.batching import Request
from dera_peft.decoding.prompts import RESULT_COLUMNS, Prompt
from dera_peft.errors import DeRaError
from dera_peft.files import write_atomically


class Results:
    """
    A `.jsonl` file that a run appends to and a later run continues.

    Each row carries the run's fingerprint under "run". A last line that was torn by an interruption is dropped and made
    again; a file of another run, or one that is damaged elsewhere, is an error and stays as it is.

    Args:
        file: is made with the first rows, if it is not there; it must be possible to write it.
        run: from `fingerprint`.
        argument: what names the file for the user, for messages.

    Raises:
        DeRaError: the file is of another run or damaged, or it can't be read or written.
    """

    def __init__(self, file: str | os.PathLike, run: str, argument: str = "output_dir"):
        self.file = Path(file)
        self.run = run
        self.rows: list[dict] = []
        if not is_writable(self.file, argument):
            return
        self.rows, torn = read_rows(self.file)
        if other := next((row["run"] for row in self.rows if row["run"] != run), None):
            raise DeRaError(
                f"{str(self.file)!r} holds the results of other settings (run {other}, this one is {run}): move it "
                "away or name another output."
            )
        cut_torn(self.file, torn, json.dumps({"run": run})[:-1])

    def finished(self, prompts: Sequence[Prompt]) -> dict[Request, dict]:
        """
        The rows so far by the request that they answer.

        Raises:
            DeRaError: they are of other prompts than these, or their prompts had other columns, which a reward may
                have read.
        """
        rows = {}
        for row in self.rows:
            index = row["index"]
            if index < len(prompts):
                self._compare(row, prompts[index])
            rows[Request(index, row["lambda"], row["sample"])] = row
        return rows

    def _compare(self, row: dict, prompt: Prompt) -> None:
        way_out = "Move the file away or name another output."
        if prompt.content != row["prompt"]:
            raise DeRaError(
                f"{str(self.file)!r} holds the results of other prompts: {row['prompt']!r}, where {prompt.source} is "
                f"{prompt.content!r}. {way_out}"
            )
        before, now = _columns(row), _columns(prompt.columns)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise DeRaError(
                    f"{str(self.file)!r} holds the results of other columns: {name!r} was "
                    f"{before.get(name, 'not there')}, and {prompt.source} has {now.get(name, 'none')}. {way_out}"
                )

    def append(self, rows: Iterable[dict]) -> list[dict]:
        """Writes rows, each with this run's fingerprint, and returns them so."""
        rows = [{"run": self.run, **row} for row in rows]
        append_rows(self.file, rows)
        self.rows.extend(rows)
        return rows


def is_writable(file: Path, argument: str) -> bool:
    """
    Whether there is such a file. Better known now than after an hour of decoding is whether it can be written.

    Raises:
        DeRaError: it can't; the message names `argument`.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(file)
        with file.open("ab"):
            pass
        if is_new:
            file.unlink()
    except OSError as error:
        raise DeRaError(f"{argument}: {str(file)!r} can't be written: {error.strerror}.") from error
    return not is_new


def read_rows(file: Path, keys: Sequence[str] = ("run",)) -> tuple[list[dict], bytes]:
    """
    The whole lines of a file, and what an interruption left of one behind them.

    Args:
        keys: that every row has.

    Raises:
        DeRaError: a line is not a row of results.
    """
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
            for key in keys:
                row[key]
        except (ValueError, KeyError, TypeError):
            raise DeRaError(
                f"{str(file)!r}, line {number}, is not a row of results: move the file away or name another output."
            ) from None
        rows.append(row)
    return rows, torn


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


def append_rows(file: Path, rows: Iterable[dict]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """Whole or not at all."""
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _columns(row: dict) -> dict[str, str]:
    """A prompt's own columns in a row, each as JSON, in which NaN is NaN."""
    own = row.keys() - RESULT_COLUMNS - {"prompt", "lambda"}
    return {name: json.dumps(row[name], sort_keys=True, ensure_ascii=False) for name in own}
