"""How a program ends: errors, and Ctrl-C."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from safetensors import SafetensorError

from dera_peft.errors import DeRaError

INTERRUPTED = 130  # the exit code of Ctrl-C, Typer's too, as shells have it: 128 + SIGINT
DEBUG = "--debug"
TRAINERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")  # what transformers' own --debug takes


def split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """
    The arguments without `--debug` (or `--debug true`), wherever it stands, and whether it was there. A trainer's own
    --debug stays.
    """
    rest: list[str] = []
    debug = False
    for place, argument in enumerate(arguments):
        follower = arguments[place + 1] if place + 1 < len(arguments) else ""
        if argument == DEBUG and follower not in TRAINERS_DEBUG:
            debug = True
        elif not (argument == "true" and place and arguments[place - 1] == DEBUG):
            rest.append(argument)
    return rest, debug


def run_program(program: Callable[[], None], debug: bool = False) -> None:
    """
    Runs a program to its end. An error that a user can mend is one line and exit code 2; any other is a defect and
    shows its traceback.

    Args:
        debug: show the traceback of the former too.
    """
    _replace_what_is_not_encoded()
    try:
        try:
            program()
        finally:
            sys.stdout.flush()  # here, where a full disk is an error like any other
    except (DeRaError, OSError, SafetensorError) as error:  # the last is of a file that can't be read or written
        _drop_unwritten_output()
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _tell_interrupted()
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _tell_interrupted()
        raise


@contextmanager
def process_group() -> Iterator[None]:
    """Ends the process group that its body joined, if a launcher started several processes; after an error too."""
    failed = True
    try:
        yield
        failed = False
    finally:
        distributed = sys.modules.get("torch.distributed")  # importing it takes seconds, which --help does not need
        has_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
        # NCCL would wait for the other processes, which need not have failed; that this one exits ends them
        if has_group and not (failed and distributed.get_backend() == "nccl"):
            distributed.destroy_process_group()


def _replace_what_is_not_encoded() -> None:
    """A terminal that knows ASCII alone shows "?" for λ, where Python would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _drop_unwritten_output() -> None:
    """Standard output that can't be written would be tried again, and told of, when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_interrupted() -> None:
    print(
        "interrupted; an output file or folder keeps what it has, and the command that writes it goes on from there",
        file=sys.stderr,
    )
