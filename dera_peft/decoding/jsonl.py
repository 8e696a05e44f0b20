"""Lines of JSON, as users have them."""

import json

from dera_peft.errors import DeRaError


def parse_row(line: str | bytes, source: str) -> dict:
    """A line of a .jsonl file. Raises `DeRaError`, with its `source`, where it is not a JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DeRaError(f"{source}: not valid JSON: {error}") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DeRaError(f"{source}: not valid UTF-8: an escape names half of a character.") from None
    if not isinstance(row, dict):
        raise DeRaError(f"{source}: a row must be a JSON object; got {type(row).__name__}.")
    return row
