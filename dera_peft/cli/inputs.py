"""What several commands read."""

from typing import TYPE_CHECKING

from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from dera_peft.checkpoint.record import Record
    from dera_peft.checkpoint.source import ModelSource


def resolve_one_aligned(source: "ModelSource", command: str, way_out: str) -> "Record":
    """
    The record of a model with one aligned adapter.

    Raises:
        DeRaError: it has several, which the command does not take.
    """
    record = source.resolve()
    if len(record.branches) > 2:
        raise DeRaError(f"{command} takes one aligned model, and the record has {list(record.branches)[1:]}; {way_out}")
    return record
