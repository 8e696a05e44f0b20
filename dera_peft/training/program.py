"""What the training programs share: settings, messages, and how they treat what an earlier run left."""

import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from dera_peft.errors import DeRaError
from dera_peft.files import RUN_FILE, check_exists, check_file, is_same_folder, write_atomically
from dera_peft.lock import hold
from dera_peft.messages import is_main_process
from dera_peft.settings import COUNT, Settings, read_yaml, setting
from dera_peft.user_code import is_object_path

logger = logging.getLogger(__name__)

# What the programs write, beside a tokenizer, which every run writes anew; with --overwrite it goes.
MODEL_FILES = ("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model*.safetensors*")
MODEL_FOLDERS = ("merged", "sft")
SOURCES = ("model_name_or_path", "sft_adapter", "base", "adapter")  # settings that name what a run begins with


@dataclass(frozen=True)
class ProgramSettings(Settings):
    """Settings of every program, beside those of TRL."""

    overwrite: bool = setting(False, "Do the work again where its results are there already, and replace them.")
    num_processes: int | None = setting(
        None, "Stop unless so many processes run, as a launcher was asked for.", check=COUNT, metavar="N"
    )


@dataclass(frozen=True)
class DataSettings(ProgramSettings):
    """The rows that a trainer is given; `dataset_name` is each program's own, for what it may hold."""

    dataset_config: str | None = setting(None, "Configuration of a hub dataset.", metavar="NAME")
    dataset_train_split: str = setting("train", "Split to train on; a part, as train[:95%].", metavar="SPLIT")
    dataset_test_split: str | None = setting(None, "Split to evaluate on, if any.", metavar="SPLIT")
    max_bad_rows: float = setting(
        0.5, "Stop where a larger share of the rows is unusable or cut by max_length.", metavar="SHARE"
    )


def log(message: str, level: int = logging.INFO) -> None:
    """Logs a message, once however many processes there are."""
    if is_main_process():
        logger.log(level, message, stacklevel=2)


def check_not_pushed(training_args) -> None:
    """Raises `DeRaError` where TRL would upload an adapter, which it would do without the dera.json."""
    if training_args.push_to_hub:
        target = training_args.hub_model_id or "ORG/NAME"
        raise DeRaError(
            "push_to_hub=True: an adapter goes to the hub with its dera.json, once it is trained: leave push_to_hub "
            f"out, and then run dera push --adapter {training_args.output_dir} --to {target}."
        )


def check_processes(expected: int | None) -> int:
    """
    The number of processes of this run.

    Raises:
        DeRaError: it is not the one expected, or not the one that the launcher was asked for. On the CPU
            `accelerate launch --num_processes N` starts one process, and says nothing.
    """
    from accelerate import PartialState

    running = PartialState().num_processes
    asked = expected or _asked_of_accelerate() or int(os.environ.get("WORLD_SIZE", running))
    if asked != running:
        processes = "is 1 process" if running == 1 else f"are {running} processes"
        raise DeRaError(
            f"num_processes={asked}, but there {processes}. On the CPU accelerate's launcher starts only one; "
            f"torchrun starts them: torchrun --nproc_per_node {asked} -m dera_peft.cli …"
        )
    return running


def run_by(processes: int, sharding: str | None) -> dict[str, Any]:
    """What a run's record says of its processes; a checkpoint of a sharded run is of no use to another."""
    return {"processes": processes} if sharding is None else {"processes": processes, "sharding": sharding}


def _asked_of_accelerate() -> int | None:
    """What `accelerate launch --num_processes` said, if that is this program's parent; only Linux tells."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "ACCELERATE_USE_CPU" not in os.environ or not parent.is_file():
        return None
    words = parent.read_bytes().decode(errors="replace").replace("=", "\0").split("\0")
    for option, value in pairwise(words):
        if option in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return None


def settings_of(*arguments: Any, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of dataclasses that are not at their defaults, as JSON would hold them; without those to `ignore`."""
    settings = {}
    for group in arguments:
        for f in fields(group):
            value = getattr(group, f.name)  # to_dict would mask an eos_token as it does the hub's
            if f.init and value != (f.default if f.default_factory is MISSING else f.default_factory()):
                settings[f.name] = value
    return _to_write(settings, ignore)


def given_settings(given: dict[str, Any], *arguments: Any, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """
    What a user gave, as JSON would hold it: without what dataclasses derive from it and from the machine.

    Args:
        given: values by name, as `Parser.given`.
        arguments: dataclasses made of them, which have read the texts that stand for dicts.
        ignore: names to leave out.
    """
    made = {name: value for group in arguments for name, value in vars(group).items() if isinstance(value, dict)}
    return _to_write({name: made.get(name, value) for name, value in given.items()}, ignore)


def _to_write(settings: dict[str, Any], ignore: tuple[str, ...]) -> dict[str, Any]:
    """Settings without those to `ignore`, those of the folder alone, and secrets of the hub's."""
    left_out = {*ignore, "output_dir", "overwrite", "num_processes", "hub_token"}
    written = {name: value for name, value in settings.items() if name not in left_out}
    for name, value in written.items():
        if isinstance(value, dict):  # model_init_kwargs may hold a token
            written[name] = {key: part for key, part in value.items() if key != "token"}
    return json.loads(json.dumps(written, default=str))


def hold_folder(folder: str | os.PathLike) -> AbstractContextManager[None]:
    """Keeps other programs out of an output folder; of several processes of this one the first does."""
    return hold(Path(folder) if is_main_process() else None, "output_dir", is_folder=True)


def check_files(arguments: Sequence[str] | None) -> None:
    """
    Checks that the files and folders that a program's arguments name are there, before TRL is imported, which takes
    seconds.

    Args:
        arguments: of the command line; `sys.argv`'s unless given.

    Raises:
        DeRaError: one is not.
    """
    words = [*(sys.argv[1:] if arguments is None else arguments), ""]
    named: dict[str, Any] = {}
    for word, follower in pairwise(words):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            named[name[2:].replace("-", "_")] = value if equals else follower
    if "config" in named:
        of_file = {str(key).replace("-", "_"): value for key, value in read_yaml(named["config"]).items()}
        named = {**of_file, **named}
    for name in (*SOURCES, "reward", "dataset_name", "prompts", "held_out_prompts"):
        value = named.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise DeRaError(f"{name}={value!r} must be a text.")
        check_file(name, value)
        if name in (*SOURCES, "reward") and not is_object_path(value):
            check_exists(name, value)


class OutputFolder:
    """
    A folder of results, and `run.json` in it: which settings and inputs made them, and whether they are complete.

    Of several processes the first one writes.

    Args:
        folder: is made if it is not there.
        settings, inputs: of this run, as JSON-like values; inputs are fingerprints.
        overwrite: forget what is there.
        given: what the user gave of the settings, for who repeats the run; it is not compared.
        has_model: whether what is made is a model, which must not be written over another one.

    Raises:
        DeRaError: it holds the results of other settings or inputs, a model that no such program made, or the one that
            this run begins with.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict,
        inputs: dict,
        overwrite: bool = False,
        given: dict | None = None,
        has_model: bool = True,
    ):
        self.folder = Path(folder)
        self.file = self.folder / RUN_FILE
        self.record = {"settings": settings, "inputs": inputs}
        self.given = {} if given is None else {"given": given}
        self.is_complete = False
        from accelerate import PartialState

        with PartialState().main_process_first():
            if has_model or overwrite:
                self._check_sources(overwrite)
            if overwrite and is_main_process():
                self._forget()
            if self.file.is_file():
                self._compare()
            elif found := next(self._model_files(), None) if has_model and not overwrite else None:
                raise DeRaError(
                    f"output_dir={str(self.folder)!r} holds {found.name!r}, which no run of this program made: name "
                    "another folder, or pass --overwrite true."
                )
            if not self.is_complete:
                self._write(complete=False)

    @staticmethod
    def is_unfinished(folder: str | os.PathLike) -> bool:
        """Whether a program has begun to fill `folder`, and has not come to its end."""
        try:
            return not json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))["complete"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            return True

    def _forget(self) -> None:
        """
        Takes away what would let an unfinished folder pass for a finished one, or be continued; and, where a program
        made this folder, the model files of which the next one may write others.
        """
        if self.file.is_file():
            for file in list(self._model_files()):
                file.unlink()
            for name in MODEL_FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.file.unlink(missing_ok=True)
        (self.folder / "dera.json").unlink(missing_ok=True)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def _check_sources(self, overwrite: bool) -> None:
        """Raises `DeRaError` where the files of what this run begins with would be written over, or taken away."""
        for name in SOURCES:
            value = self.record["settings"].get(name)
            if value and Path(value).exists():
                is_within = Path(value).resolve().is_relative_to(self.folder.resolve())
                if is_same_folder(self.folder, value) or (overwrite and is_within):
                    raise DeRaError(f"{name}={value!r} is in the folder to write: choose another output_dir.")

    def _model_files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(map(self.folder.glob, MODEL_FILES))

    def _results(self) -> list[Path]:
        """The files that make up what a program left: weights, configs and the record."""
        folders = (file for name in MODEL_FOLDERS for file in (self.folder / name).rglob("*"))
        found = (*self._model_files(), *self.folder.glob("dera.json"), *folders)
        return [file for file in found if file.is_file()]

    def _is_begun(self) -> bool:
        """Whether there is anything that a later run would continue or reuse."""
        rows = [file for file in self.folder.glob("completions*.jsonl") if file.stat().st_size]
        return bool(rows or self._results() or any(self.folder.glob("checkpoint-*")))

    def _damaged(self, files: dict[str, int]) -> str | None:
        """The first of the results that is no longer there as it was written, with its sizes in bytes."""
        for name, size in files.items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else 0
            # a config may be edited, and weights not
            if not found or (found != size and file.suffix == ".safetensors"):
                return f"{name} has {found} of {size} bytes" if found else f"{name} is missing or empty"
        return None

    def _compare(self) -> None:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            self.is_complete = found["complete"]
            if not self.is_complete and not self._is_begun():
                return  # a try that came to nothing
            if self.is_complete and (damage := self._damaged(found.get("files", {}))):
                log(f"{self.folder}: {damage}: making it again", logging.WARNING)
                self.is_complete = False
            for kind in ("settings", "inputs"):
                for name in sorted({*self.record[kind], *found[kind]}):
                    now, before = self.record[kind].get(name, "the default"), found[kind].get(name, "the default")
                    if now != before:
                        raise DeRaError(
                            f"{str(self.folder)!r} was made with {name}={before!r}, and now it is {now!r}: pass "
                            "--overwrite true to make it again, or another --output_dir."
                        )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DeRaError):
                raise
            raise DeRaError(
                f"{str(self.file)!r} is damaged ({error}); pass --overwrite true to start again."
            ) from error

    def _write(self, complete: bool) -> None:
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"complete": complete, **self.record, **self.given}
        if complete:
            values["files"] = {str(file.relative_to(self.folder)): file.stat().st_size for file in self._results()}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.file, text)

    def log_reused(self) -> None:
        log(f"{self.folder} is complete: reusing it (--overwrite true makes it again)")

    def complete(self) -> None:
        """Marks the results as whole; to be called last."""
        self.is_complete = True
        self._write(complete=True)
