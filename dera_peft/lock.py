"""One command at a time writes into a file or a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dera_peft.errors import DeRaError
from dera_peft.files import FOLDER_LOCK, check_writable


@contextmanager
def hold(output: Path | None, argument: str, *, is_folder: bool = False) -> Iterator[None]:
    """
    Keeps other commands out of an output meanwhile. The hold ends with the process, however that ends.

    Args:
        output: None, a device or a pipe holds nothing.
        argument: what names it for the user, for messages.
        is_folder: whether it is a folder, which is made, or a file.

    Raises:
        DeRaError: another command holds it, or it can't be written.
    """
    if output is None:
        yield
        return
    output = Path(os.path.realpath(output))  # by its one name
    if is_folder and output.exists() and not output.is_dir():
        raise DeRaError(f"{argument}={str(output)!r} is a file: name a folder.")
    if not is_folder:
        check_writable(output, argument)
        if output.exists() and not output.is_file():
            yield
            return
    file = output / FOLDER_LOCK if is_folder else output.with_name(f".{output.name}.lock")
    is_new = is_folder and not output.exists()
    check_writable(file, argument)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DeRaError(
            f"{argument}={str(output)!r}: another command is writing there; wait for it, or name another output."
        ) from None
    except OSError as error:
        raise DeRaError(f"{argument}={str(output)!r} can't be locked: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: who waits for the old file would see that it is gone
            file.unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # it has something in it
                output.rmdir()
