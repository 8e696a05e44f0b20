"""The package as users install it: built, checked, installed outside the clone, and its commands run from there."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from small_runs import train

from dera_peft.checkpoint.record import Record
from dera_peft.evaluate.retrain import retrain_command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("generate", "score", "info", "export", "sweep", "bench", "sft", "preferences", "dpo")
# in one process, which imports torch once for all of them
HELPS = """
import sys
from dera_peft.cli.app import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code in (0, None), name
    print("\\f", flush=True)
"""


def run(*command: str | Path, **arguments) -> str:
    """What a command that is to succeed prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **arguments)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel made of it, from a copy of the clone."""
    folder = tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "clone", ignore=left_out)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "clone")
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a command line outside the clone, where the wheel is installed over the packages that are here."""
    target, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    (wheel,) = built.glob("*.whl")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check",
        "--target", target, wheel,
    )  # fmt: skip
    path = os.pathsep.join([str(target / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(target), "PATH": path, "COLUMNS": "100"}
    where = run(sys.executable, "-c", "import dera_peft; print(dera_peft.__file__)", cwd=elsewhere, env=environment)
    assert Path(where.strip()).is_relative_to(target), where
    return lambda line: run(*shlex.split(line), cwd=elsewhere, env=environment)


def test_what_is_in_the_wheel_and_in_the_sdist(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    names = zipfile.ZipFile(wheel).namelist()
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "dera_peft").rglob("*") if "__pycache__" not in file.parts}
    expected = {name for name in files if (ROOT / name).is_file()}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"dera_peft/py.typed", "dera_peft/evaluate/report/template/report.html"} <= expected
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_every_command_shows_its_help_outside_the_clone(installed):
    texts = installed(shlex.join([sys.executable, "-c", HELPS, *COMMANDS])).split("\f")
    for name, text in zip(COMMANDS, texts, strict=False):
        assert f"dera {name} [" in text.strip().split("\n\n")[0], name


def test_an_adapter_is_described_and_trained_again_by_the_sweeps_command(installed, tiny_base, preferences, tmp_path):
    settings = {"model_name_or_path": tiny_base, "dataset_name": preferences, "quantization": "nf4", "max_steps": 1}
    adapter = train("dpo", tmp_path / "dpo", **settings)
    shown = json.loads(installed(f"dera info --adapter {adapter} --json"))
    assert shown["base"] == str(tiny_base)

    command = retrain_command(str(adapter), Record.load(adapter), 0.25, tmp_path)
    assert command == f"dera dpo --config {tmp_path}/retrain.yaml"
    assert yaml.safe_load((tmp_path / "retrain.yaml").read_text())["quantization"] == "nf4"
    installed(command)
    again = Record.load(tmp_path / "dpo-beta-0.25").training
    assert (again["beta"], again["steps"], again["quantization"]) == (0.25, 1, "nf4")
