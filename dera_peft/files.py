"""Writing whole files, and the name of one that two rooms know."""

import os
from pathlib import Path

RUN_FILE = "run.json"  # training's, of which settings and inputs made a folder; `training.program.OutputFolder`


def write_atomically(file: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file as a whole: an interruption leaves the old file, or none. Text is written as UTF-8."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, file)
