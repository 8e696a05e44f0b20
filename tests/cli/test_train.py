"""The training programs as commands: what reaches them, and how they end."""

import runpy
import subprocess
import sys

import pytest

from dera_peft import DeRaError
from dera_peft.cli.app import main
from dera_peft.training import dpo


@pytest.fixture
def run_dpo(monkeypatch, capsys):
    """Runs `dera` with a `main` in place of DPO's; returns the exit code and stderr."""

    def run(program, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(dpo, "main", program)
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        return caught.value.code or 0, capsys.readouterr().err

    return run


def fail(arguments):
    raise DeRaError("beta=x must be a number.")


def interrupt(arguments):
    raise KeyboardInterrupt


def test_arguments_arrive_as_they_are(run_dpo):
    given = []
    arguments = ["--beta", "-0.5", "--lora_target_modules", "q_proj", "v_proj", "--max-length=7", "-h", "--use_peft"]
    assert run_dpo(given.extend, "dpo", *arguments) == (0, "")
    assert given == arguments


def test_an_error_is_one_line_and_with_debug_a_traceback(run_dpo):
    assert run_dpo(fail, "dpo") == (2, "error: beta=x must be a number.\n")
    for arguments in (["--debug", "dpo"], ["dpo", "--beta", "x", "--debug"]):
        code, err = run_dpo(fail, *arguments)
        assert code == 2
        assert "Traceback" in err


def test_an_interruption_is_one_line(run_dpo):
    code, err = run_dpo(interrupt, "dpo")
    assert code == 130
    assert err.startswith("interrupted;")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["sft", "preferences", "dpo"])
def test_the_programs_of_a_clone_are_the_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--bf15", "1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"training.{name}", run_name="__main__")
    assert caught.value.code == 2
    assert f"error: --bf15 is not an option of dera {name}; " in capsys.readouterr().err


def test_help_needs_no_torch():
    program = "import sys; from dera_peft.cli.app import app; assert not {'torch', 'trl', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
