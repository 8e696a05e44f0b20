"""What the commands write, and where: outputs that are taken, disks that are full, terminals that know ASCII alone."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dera_peft import DeRaModel
from dera_peft.cli import app
from dera_peft.lock import hold

TEXT = "λ: Rain fell on the café"


@pytest.fixture
def dera(monkeypatch, capsys):
    """Runs the command; returns exit code and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def dera(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dera", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        return caught.value.code or 0, capsys.readouterr().err

    return dera


@pytest.fixture(scope="module")
def adapter(tiny_base, tiny_adapter, tmp_path_factory) -> Path:
    """With a record, which names its base."""
    folder = tmp_path_factory.mktemp("adapter")
    DeRaModel.from_pretrained(tiny_base, tiny_adapter).save_pretrained(folder)
    return folder


def test_paths_are_checked_before_torch_is_imported(tmp_path):
    """Which takes seconds; a mistyped path is to be told at once."""
    (tmp_path / "p.txt").write_text("Rain\n")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"dataset_name": "./no.jsonl"}))
    cases = [
        ["generate", "--adapter", "./no", "--prompt", "a"],
        ["generate", "--base", "./no", "--adapter", str(tmp_path), "--prompt", "a"],
        ["generate", "--adapter", str(tmp_path), "--prompts", "no.txt"],
        ["generate", "--config", "no.yaml"],
        ["score", "--adapter", "./no", "--completions", "p.jsonl"],
        ["score", "--adapter", str(tmp_path), "--completions", "no.jsonl"],
        ["info", "--adapter", "./no"],
        ["export", "--adapter", "./no", "--lambda", "0.5", "--output", "out"],
        ["sweep", "--adapter", "./no", "--prompts", "p.txt", "--reward", "length"],
        ["sweep", "--adapter", str(tmp_path), "--prompts", "no.csv", "--reward", "length"],
        ["sweep", "--adapter", str(tmp_path), "--prompts", "p.txt", "--reward", "no.py:reward"],
        ["sweep", "--adapter", str(tmp_path), "--prompts", "p.txt", "--reward", "length", "--arm", "adapter=./no"],
        ["bench", "--adapter", "./no"],
        ["dpo", "--config", "no.yaml"],
        ["dpo", "--config", "c.yaml"],
        ["sft", "--model_name_or_path", "./no"],
        ["preferences", "--reward=no.py:reward"],
    ]
    program = f"""
import contextlib, io, sys
from dera_peft.cli.app import main
for case in {cases!r}:
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            main(case)
    except SystemExit as end:
        assert end.code == 2, (case, end.code)
    assert "there is no such f" in err.getvalue(), (case, err.getvalue())
    assert "torch" not in sys.modules, case
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["generate", "score", "export", "sweep", "bench", "sft", "dpo", "preferences"])
def test_an_output_that_another_command_writes_is_refused(dera, adapter, tiny_base, preferences, tmp_path, command):
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "p.txt").write_text("Rain\n")
    output = tmp_path / "out"
    model, training = ["--adapter", adapter], ["--model_name_or_path", tiny_base, "--output_dir", output]
    prompts = ["--prompts", tmp_path / "p.txt"]
    arguments = {
        "generate": [*model, *prompts, "--output", output],
        "score": [*model, "--completions", tmp_path / "c.jsonl", "--output", output],
        "export": [*model, "--lambda", "0.5", "--output", output],
        "sweep": [*model, *prompts, "--reward", "length", "--output-dir", output],
        "bench": ["--shape", "smollm2-135m", "--layers", "1", "--plot", f"{output}.png"],
        "sft": [*training, "--dataset_name", preferences],
        "dpo": [*training, "--dataset_name", preferences, "--use_peft", "true"],
        "preferences": [*training, *prompts, "--reward", "length.py:length"],
    }[command]
    (tmp_path / "length.py").write_text("def length(prompts, completions, **columns): return [0.0]\n")
    arguments = [f"{tmp_path}/length.py:length" if each == "length.py:length" else each for each in arguments]
    is_file = command in ("generate", "score", "bench")
    with hold(Path(f"{output}.png") if command == "bench" else output, "--output", is_folder=not is_file):
        code, err = dera(command, *arguments)
    assert code == 2, err
    assert "another command is writing there; wait for it, or name another output" in err
    assert err.count("\n") == 1


def test_an_export_into_its_own_adapter_is_refused(dera, adapter, monkeypatch):
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    monkeypatch.chdir(adapter)
    for output in (adapter, ".", f"../{adapter.name}"):
        code, err = dera("export", "--adapter", adapter, "--lambda", 0.5, "--output", output, "--overwrite")
        assert code == 2
        assert "which is read from there" in err
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


def test_a_terminal_that_knows_ascii_alone(dera, adapter, monkeypatch):
    decoding = ["--adapter", adapter, "--prompt", TEXT, "--max-new-tokens", 8, "--lambda", "0,1"]

    def printed(encoding: str, *arguments) -> bytes:
        stream = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding, write_through=True))
        code, err = dera("generate", *decoding, *arguments)
        assert code == 0, err
        return stream.getvalue()

    assert TEXT in printed("utf-8").decode()
    shown = printed("ascii").decode("ascii")
    assert TEXT.encode("ascii", "replace").decode() in shown
    assert "?=1" in shown
    rows = printed("utf-8", "--json"), printed("ascii", "--json")
    assert rows[0] != rows[1]
    assert [json.loads(line) for line in rows[0].splitlines()] == [json.loads(line) for line in rows[1].splitlines()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_message(dera, adapter, monkeypatch):
    decoding = ["generate", "--adapter", adapter, "--prompt", "Rain", "--max-new-tokens", 2]
    code, err = dera(*decoding, "--output", "/dev/full")
    assert (code, err.count("error: "), err.count("Traceback")) == (2, 1, 0), err
    assert "'/dev/full' can't be written: No space left on device" in err
    for arguments in (["--json"], []):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, err = dera(*decoding, *arguments)
        assert (code, err.count("error: "), err.count("Traceback")) == (2, 1, 0), err
        assert "No space left on device" in err
