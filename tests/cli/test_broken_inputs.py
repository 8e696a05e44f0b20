"""Whatever a file or an option holds: every command ends with one message and exit code 2, and never a traceback."""

import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dera_peft import DeRaModel
from dera_peft.cli import app

SEEDS = range(10)  # each breaks one input of each command
ROWS = [{"prompt": "Rain fell", "completion": " on the market", "chosen": " on", "rejected": " off"}] * 3
VALUES = (None, True, -1, 10**400, 0.5, float("nan"), "", "text", "\0", "∞", [], [[]], {}, {"a": {"b": []}}, [None, 1])


@pytest.fixture(scope="module")
def originals(tiny_base, tiny_adapter, tmp_path_factory) -> Path:
    """What the commands are given, whole: a base, an adapter with its record, data, and a config of each command."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(tiny_base, folder / "base")
    DeRaModel.from_pretrained(folder / "base", tiny_adapter).save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "prompts.txt").write_text("Rain fell\nA fox\n")
    (folder / "prompts.csv").write_text("prompt,topic\nRain fell,weather\n")
    (folder / "reward.py").write_text(
        "def reward(prompts, completions, **columns): return [1.0 * len(text) for text in completions]\n"
    )
    adapter, decoding = {"adapter": "adapter"}, {"max_new_tokens": 2}
    training = {"output_dir": "out", "report_to": "none", "max_steps": 1, "use_peft": True}
    configs = {
        "generate": {**adapter, **decoding, "prompts": "prompts.txt", "lambdas": [0, 0.5], "output": "out.jsonl"},
        "score": {**adapter, "completions": "rows.jsonl", "lambdas": [1.0], "output": "out.jsonl"},
        "info": {**adapter},
        "export": {**adapter, "lam": 0.5, "output": "out", "prompts": "prompts.csv"},
        "sweep": {
            **adapter, **decoding, "prompts": "rows.jsonl", "rewards": ["reward.py:reward"], "lambdas": [0.0, 1.0],
            "samples": 1, "output_dir": "out",
        },
        "bench": {**adapter, "prompt": 2, "new": 1, "rounds": 1, "batch": [1], "plot": "bench.svg"},
        "sft": {**training, "model_name_or_path": "base", "dataset_name": "rows.jsonl"},
        "dpo": {**training, "model_name_or_path": "base", "dataset_name": "rows.jsonl"},
        "preferences": {
            "model_name_or_path": "base", "prompts": "prompts.txt", "reward": "reward.py:reward", "output_dir": "out",
            "max_new_tokens": 2,
        },
    }  # fmt: skip
    for command, config in configs.items():
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(config))
    return folder


# -- ways to break a file, none of which a command could work with ---------------------------------------------------


def missing(file: Path, rng: random.Random) -> None:
    file.unlink()


def folder_in_its_place(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def link_to_itself(file: Path, rng: random.Random) -> None:
    """Which nobody can read, root neither."""
    file.unlink()
    file.symlink_to(file)


def not_utf8(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"\xff\xfe\x80" + file.read_bytes())


def emptied(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def cut(file: Path, rng: random.Random) -> None:
    """Rows within their first bytes, since a file that is cut later may be a whole, shorter one."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(1, 8 if file.suffix == ".jsonl" else len(content) - 3)])


def noise(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"{[\0" + rng.randbytes(200))


EVERY = (missing, folder_in_its_place, link_to_itself, not_utf8, emptied, cut, noise)
TEXTS = (missing, folder_in_its_place, link_to_itself, not_utf8, emptied)  # of which others may be texts as well
FILES: dict[str, tuple[Callable, ...]] = {
    "rows.jsonl": EVERY,
    "prompts.txt": TEXTS,
    "prompts.csv": TEXTS,
    "reward.py": (missing, folder_in_its_place, link_to_itself, not_utf8, emptied, noise),
    "base/config.json": EVERY,
    "base/model.safetensors": EVERY,
    "base/tokenizer.json": (folder_in_its_place, not_utf8, emptied, cut, noise),
    "adapter/adapter_config.json": EVERY,
    "adapter/adapter_model.safetensors": EVERY,
    "adapter/dera.json": EVERY[1:],  # where it is missing the adapter's config names the base
}
USES = {  # the files that a command reads
    "generate": ("prompts.txt", "ADAPTER", "base/tokenizer.json"),
    "score": ("rows.jsonl", "ADAPTER", "base/tokenizer.json"),
    "info": ("ADAPTER",),
    "export": ("prompts.csv", "ADAPTER", "base/tokenizer.json"),
    "sweep": ("rows.jsonl", "reward.py", "ADAPTER", "base/tokenizer.json"),
    "bench": ("ADAPTER",),
    "sft": ("rows.jsonl", "BASE", "base/tokenizer.json"),
    "dpo": ("rows.jsonl", "BASE", "base/tokenizer.json"),
    "preferences": ("prompts.txt", "reward.py", "BASE", "base/tokenizer.json"),
}
GROUPS = {
    "BASE": ("base/config.json", "base/model.safetensors"),
    "ADAPTER": tuple(name for name in FILES if name.startswith(("base/c", "base/m", "adapter/"))),
}


def break_config(config: Path, rng: random.Random) -> str:
    """A value of a wrong type, a key that is none, or a file that is no YAML; returns what was done."""
    kind = rng.choice(["value", "value", "value", "key", "file"])
    if kind == "file":
        how = rng.choice([missing, folder_in_its_place, link_to_itself, not_utf8, noise])
        how(config, rng)
        return how.__name__
    values = yaml.safe_load(config.read_text())
    if kind == "key":
        name, value = rng.choice(["lamdba", "", "a b", "ключ"]), 1
    else:
        name, value = rng.choice(list(values)), rng.choice(VALUES)
        while not is_wrong(name, value):
            name, value = rng.choice(list(values)), rng.choice(VALUES)
    values[name] = value
    config.write_text(yaml.safe_dump(values))
    return f"{name}={value!r}"


def is_wrong(name: str, value: object) -> bool:
    """Whether no command takes that value of that setting: null is as if it were left out, and 0.5 may be λ."""
    if name in ("output", "output_dir", "plot", "report_to", "use_peft"):
        return isinstance(value, dict)
    if name in ("lambdas", "lam", "max_steps", "max_new_tokens", "samples", "prompt", "new", "rounds", "batch"):
        return isinstance(value, dict) or value in ("text", "∞", [[]], [None, 1])
    return value is not None and value != ""


@pytest.fixture
def dera(monkeypatch, capsys, originals):
    """Runs a command with its config in the folder; returns exit code and stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    level = logging.getLogger("datasets").level
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # as `be_quiet` has it where datasets is imported later

    def dera(command: str, folder: Path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["dera", command, "--config", f"{command}.yaml"])
        with pytest.raises(SystemExit) as caught:
            app.main()
        return caught.value.code or 0, capsys.readouterr().err

    yield dera
    logging.getLogger("datasets").setLevel(level)


def copy_of(originals: Path, folder: Path) -> Path:
    """The same tree, of links to the large files; the one to be broken becomes a file of its own."""
    shutil.copytree(originals, folder, copy_function=os.link)
    return folder


def own(file: Path) -> Path:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("command", USES)
def test_a_broken_input_is_one_message(dera, originals, tmp_path, command):
    files = [name for used in USES[command] for name in GROUPS.get(used, (used,))]
    for seed in SEEDS:
        rng = random.Random(f"{command} {seed}")
        folder = copy_of(originals, tmp_path / str(seed))
        if seed % 2:
            what = break_config(own(folder / f"{command}.yaml"), rng)
        else:
            name = rng.choice(files)
            how = rng.choice(FILES[name])
            how(own(folder / name), rng)
            what = f"{name}: {how.__name__}"
        code, err = dera(command, folder)
        told = f"dera {command}, seed {seed}, {what}:\n{err}"
        assert code == 2, told
        assert "Traceback" not in err, told
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, told
        assert len(messages[0]) > len("error: ") + 10, told
        assert len(err) < 4000, told
