"""Python objects named in a config or on a command line: `path/to/file.py:name`."""

import importlib.util
import sys
from pathlib import Path

from dera_peft.errors import DeRaError


def is_object_path(spec: str) -> bool:
    """Whether `spec` has the form `path.py:name`, as against a hub id or a folder."""
    path, colon, name = spec.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_object(spec: str):
    """
    The object `name` of the Python file `path.py`, for a `spec` of the form `path.py:name`.

    The file is the user's own program and is run. Its folder is not added to `sys.path`.

    Raises:
        DeRaError: the spec has another form, the file does not exist or does not run, or it has no such name.
    """
    if not is_object_path(spec):
        raise DeRaError(f"{spec!r} does not name a Python object: write it as path/to/file.py:name.")
    path, _, name = spec.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise DeRaError(f"{spec!r}: there is no file {path!r} (looked in {Path.cwd()}).")
    # one module a file, however often it is named: its state and its classes are then the same everywhere
    module_name = f"dera_user_{file.stem}_{abs(hash(str(file)))}"
    if module_name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(module_name, file)
        assert module_spec is not None  # the file's name ends in .py
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise DeRaError(f"{spec!r}: running {path!r} raised {type(error).__name__}: {error}") from error
    try:
        return getattr(sys.modules[module_name], name)
    except AttributeError:
        raise DeRaError(f"{spec!r}: {path!r} has no {name!r}.") from None
