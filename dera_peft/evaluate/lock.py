"""One sweep at a time writes into a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dera_peft.decoding.rows import check_writable
from dera_peft.errors import DeRaError


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """
    Keeps other sweeps out of a sweep's folder meanwhile. The hold ends with the process, however that ends.

    Raises:
        DeRaError: another sweep holds it, or it can't be written.
    """
    file = folder / "parts" / "lock"
    check_writable(file, "output_dir")
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
