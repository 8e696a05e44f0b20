"""What a sweep has made so far: rows in files that survive a kill and are continued by any number of processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dera_peft.decoding.rows import append_rows, cut_torn, is_writable, read_rows
from dera_peft.errors import DeRaError

KEY = ("arm", "index", "lambda", "sample")
FIELDS = {
    "completions": ("prompt", "completion", "ids", "finish"),
    "scores": ("kl", "log_ref"),
    "rewards": ("name", "value"),
}


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """
    Keeps other sweeps out of a sweep's folder meanwhile. The hold ends with the process, however that ends.

    Raises:
        DeRaError: another sweep holds it, or it can't be written.
    """
    file = folder / "parts" / "lock"
    is_writable(file, "output_dir")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DeRaError(
            f"output_dir={str(folder)!r}: another sweep is writing there; wait for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


class Key(NamedTuple):
    """Which completion a row is of. `lam` is the λ that it was decoded at."""

    arm: str
    index: int
    lam: float
    sample: int

    @classmethod
    def of(cls, row: dict) -> "Key":
        return cls(row["arm"], row["index"], row["lambda"], row["sample"])

    def row(self) -> dict:
        return {"arm": self.arm, "index": self.index, "lambda": self.lam, "sample": self.sample}


class Store:
    """
    Rows of one kind: `FOLDER/parts/KIND.RANK.jsonl`, a file for each process, of which each is only ever appended to.

    A row begins with the fingerprint ("run") of all that it depends on: one whose fingerprint is no longer right is as
    good as not there, and stays in the file. A last line that was torn by an interruption is made again.

    Args:
        rank: of this process, which appends to its own file and has read those of all.

    Raises:
        DeRaError: a file is damaged, or can't be written.
    """

    def __init__(self, folder: Path, kind: str, rank: int):
        self.file = folder / "parts" / f"{kind}.{rank}.jsonl"
        is_writable(self.file, "output_dir")
        self.rows: list[dict] = []
        for file in sorted(self.file.parent.glob(f"{kind}.*.jsonl")):
            try:
                rows, torn = read_rows(file, ("run", *KEY, *FIELDS[kind]))
            except FileNotFoundError:  # another process has only tried whether it can write it
                continue
            self.rows += rows
            if file == self.file:
                cut_torn(file, torn, '{"run": "')

    def append(self, rows: Iterable[dict]) -> list[dict]:
        """Rows that begin with "run"; returns them."""
        rows = list(rows)
        append_rows(self.file, rows)
        self.rows += rows
        return rows
