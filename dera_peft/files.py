"""Whether files are there and can be written; writing them whole; and the names of two that several rooms know."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dera_peft.errors import DeRaError, first_line
from dera_peft.formatting import format_bytes
from dera_peft.user_code import is_object_path

RUN_FILE = "run.json"  # training's, of which settings and inputs made a folder; `training.program.OutputFolder`
FILE_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".py")  # of prompts, data and functions
FOLDER_LOCK = ".dera.lock"  # in a folder that a command writes into, while it does; `lock.hold`


def write_atomically(file: str | os.PathLike, content: str | bytes) -> None:
    """
    Writes a file as a whole: an interruption leaves the old file, or none. Text is written as UTF-8.

    Raises:
        DeRaError: it can't be written, as on a full disk.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    with told_if_unwritable(file):
        try:
            temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            os.replace(temporary, file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def told_if_unwritable(path: str | os.PathLike) -> Iterator[None]:
    """
    For the writers of other libraries too, some of which leave out which file they could not write.

    Raises:
        DeRaError: in place of what its body raises where `path` can't be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DeRaError(f"{str(path)!r} can't be written: {reason}{_room(Path(path))}.") from error


def _room(path: Path) -> str:
    """How much the disk of `path` has left, in words."""
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), None)
    try:
        return "" if there is None else f" (the disk has {format_bytes(shutil.disk_usage(there).free)} left)"
    except OSError:
        return ""


@contextmanager
def written_as_a_whole(folder: Path) -> Iterator[Path]:
    """
    Gives a folder for files that come into `folder` together when the body ends, in place of those of their names. An
    error in the body leaves `folder` as it was.

    Raises:
        DeRaError: they can't be written, as on a full disk.
    """
    with told_if_unwritable(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
        try:
            yield made
            for file in made.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # it has something in it
                    folder.rmdir()


def check_new_folder(folder: str | os.PathLike, overwrite: bool, sources: Iterable[str] = ()) -> None:
    """
    Keeps a model's files from being written over another's.

    Args:
        overwrite: whether the user said that `folder` may have something in it.
        sources: folders (or hub ids) of what the new files are made of, which no user can mean to overwrite.

    Raises:
        DeRaError: `folder` is one of `sources`, under whatever name, or no folder, or has something in it.
    """
    folder = Path(folder)
    for source in sources:
        if is_same_folder(folder, source):
            raise DeRaError(
                f"output={str(folder)!r} is the folder of {source!r}, which is read from there: name another folder."
            )
    if folder.exists() and not folder.is_dir():
        raise DeRaError(f"output={str(folder)!r} is a file: name a folder.")
    if not overwrite and folder.is_dir() and any(each.name != FOLDER_LOCK for each in folder.iterdir()):
        raise DeRaError(f"output={str(folder)!r} is not empty: name another folder, or pass --overwrite.")


def is_same_folder(folder: Path, other: str) -> bool:
    """Whether two names are of one folder that is there, by way of links too."""
    return bool(other) and folder.is_dir() and Path(other).is_dir() and folder.samefile(other)


def check_exists(argument: str, name: str) -> None:
    """A name that can only be a path must be there; any other may be a hub id."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isfile(name) or not name
    if looks_like_path and not os.path.isdir(name):
        raise DeRaError(f"{argument}={name!r}: there is no such folder.")


def check_file(argument: str, name: str) -> None:
    """
    A name that can only be a file's, for its ending, must be there; so must the file of a function, `path.py:name`.

    Raises:
        DeRaError: it is not.
    """
    path = name.rpartition(":")[0] if is_object_path(name) else name
    if Path(path).suffix in FILE_ENDINGS and not os.path.isfile(path):
        raise DeRaError(f"{argument}={name!r}: there is no such file.")


def check_writable(file: Path, argument: str) -> None:
    """
    Makes the folder of `file`. Better known now than after an hour of decoding is whether the file can be written.

    A file that is not there yet is not made: another process may make it meanwhile.

    Raises:
        DeRaError: it can't; the message names `argument`.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.lstat(file)
        except FileNotFoundError:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        else:
            with file.open("ab"):
                pass
    except OSError as error:
        raise DeRaError(f"{argument}: {str(file)!r} can't be written: {error.strerror}.") from error
