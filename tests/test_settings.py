"""Settings: declared once, checked once, from Python, a YAML file and the command line alike."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from dera_peft.bench.config import StepSettings, SweepTimingSettings
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.export import ExportSettings
from dera_peft.cli.generate import GenerateSettings
from dera_peft.cli.info import InfoSettings
from dera_peft.cli.options import command, shown_fields
from dera_peft.cli.score import ScoreSettings
from dera_peft.cli.sweep import SweepSettings
from dera_peft.errors import DeRaError
from dera_peft.evaluate.config import SweepConfig
from dera_peft.settings import (
    AT_LEAST_1,
    COUNT,
    Check,
    Settings,
    alternatives,
    option_name,
    part,
    read_value,
    setting,
    setting_like,
    setting_of,
    type_hints,
)


@dataclass(frozen=True)
class Weights(Settings):
    """What another dataclass inherits."""

    rank: int = setting(8, "Columns of A.", check=AT_LEAST_1, metavar="N", panel="Model")
    scale: float = setting(1.0, "Times the delta.", panel="Model")


@dataclass(frozen=True, kw_only=True)
class Example(Weights):
    """A setting of every type."""

    called: ClassVar[str] = "an example"
    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("count", "share"),)

    name: str = setting(help="What it is called.")
    kind: Literal["plain", "dora"] = setting("plain", "Of adapter.")
    folder: Path | None = setting(None, "Where it goes.")
    count: int | None = setting(None, "How many.", check=COUNT)
    share: float = setting(0.5, "Of the whole.", check=Check(lambda value: 0 < value < 1, "between 0 and 1"))
    chat: bool = setting(False, "With a template.")
    fold: bool | None = setting(None, "Yes, no, or as it comes.")
    values: tuple[float, ...] = setting(
        (0.0,), "Numbers.", option="--value", parse=lambda texts: [float(x) for text in texts for x in text.split(",")]
    )
    names: tuple[str, ...] = setting((), "Texts.")
    rewards: tuple[str | Callable, ...] = setting((), "Texts or functions.")
    models: Mapping[str, str] = setting({}, "By name.")
    more: Mapping[str, str] | None = setting(None, "By name, if any.")
    device: Any = setting(None, "Anything.")


def test_values_are_converted_to_their_types(tmp_path):
    example = Example(name=tmp_path, share=0.25, scale=2, folder=str(tmp_path), values=[1, 2.5], rewards=len, names="a")
    assert (example.name, example.folder) == (str(tmp_path), tmp_path)
    assert (example.scale, type(example.scale)) == (2.0, float)
    assert (example.values, example.rewards, example.names) == ((1.0, 2.5), (len,), ("a",))
    assert Example(name="a", device={"": "cpu"}).device == {"": "cpu"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "name=3 must be a text."),
        ({"name": None}, "name=None must be a text."),
        ({"rank": 0}, "rank=0 must be at least 1."),
        ({"rank": 1.5}, "rank=1.5 must be an integer."),
        ({"rank": True}, "rank=True must be an integer."),
        ({"scale": float("nan")}, "scale=nan must be a finite number."),
        ({"count": 0}, "count=0 must be an integer of at least 1, or left out."),
        ({"count": "3"}, "count='3' must be an integer of at least 1, or left out."),
        ({"share": 1}, "share=1 must be between 0 and 1."),
        ({"chat": "yes"}, "chat='yes' must be true or false."),
        ({"fold": 1}, "fold=1 must be true or false, or left out."),
        ({"kind": "pissa"}, "kind='pissa' is not known; choose one of plain, dora."),
        ({"values": ["x"]}, "values: 'x' is not one of what it may hold: a finite number."),
        ({"rewards": [3]}, "rewards: 3 is not one of what it may hold: a text or a function."),
        ({"models": ["a"]}, "models=['a'] must be names with values."),
        ({"models": {"a": 3}}, "models={'a': 3} must be names with values."),
    ],
)
def test_a_bad_value_is_told_with_its_name_and_what_is_wanted(values, message):
    with pytest.raises(DeRaError) as raised:
        Example(**{"name": "a", **values})
    assert str(raised.value) == message


def test_a_part_of_the_settings():
    assert part(Example(name="a", rank=3), Weights) == Weights(rank=3)


def test_further_arguments_of_a_base_are_kept_as_they_are():
    arguments = {"attn_implementation": "eager", "quantization_config": None, "key_mapping": {"a": "b"}}
    assert ModelSource(base="x", base_arguments=arguments).base_arguments == arguments


def test_a_setting_like_another_has_its_help_and_check_and_a_default_of_its_own():
    @dataclass(frozen=True)
    class Larger(Weights):
        rank: int = setting_like(Weights, "rank", 64)
        bias: bool = setting(False, "Too.")

    assert Larger().rank == 64
    assert [each.name for each in fields(Larger)] == ["rank", "scale", "bias"]
    assert setting_of(fields(Larger)[0]) == setting_of(fields(Weights)[0])
    with pytest.raises(DeRaError, match="rank=0 must be at least 1"):
        Larger(rank=0)


def test_a_file_and_what_comes_before_it(tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text("name: a\nrank: 3\nshare: 0.25\nchat: true\n")
    assert Example.read(file, rank=5, scale=None) == Example(name="a", rank=5, share=0.25, chat=True)
    file.write_text("name: a\nscale: 1e-3\nshare: +5E-1\n")
    assert Example.read(file) == Example(name="a", scale=0.001, share=0.5), "numbers as YAML 1.2 has them"
    file.write_text("name: a\nmodels:\n  b: c\n")
    assert Example.read(file).models == {"b": "c"}
    file.write_text("prompts: a.txt\nmax-new-tokens: 3\n")
    assert SweepConfig.read(file).max_new_tokens == 3, "hyphens are as good as underscores"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nrnak: 3", "'rnak' is not a key of an example; do you mean 'rank'?"),
        ("name: a\nzzz: 3", "'zzz' is not a key of an example; there are chat, count, device"),
        ("rank: 3", "name is missing: set it in the config or with --name."),
        ("- a", "must hold keys with values"),
        ("name: [", "is not valid YAML"),
        ("name: a\nrank: 3\nrank: 4", "'rank' is there twice"),
        ("false", "must hold keys with values"),
        (None, "there is no such file"),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, message):
    file = tmp_path / "example.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DeRaError) as raised:
        Example.read(file)
    assert message in str(raised.value)


@pytest.fixture
def run():
    """Runs a command with these settings; returns what it was given."""
    given = []
    app = typer.Typer(context_settings={"token_normalize_func": lambda token: token.replace("_", "-")})
    command(app, Example)(lambda settings: given.append(settings))

    def run(*arguments: str) -> Example:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return given.pop()

    run.app = app
    return run


def test_the_command_line_comes_before_the_file_and_that_before_the_defaults(run, tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text("name: a\nrank: 3\nchat: true\nvalues: [7]\nshare: 0.25\n")
    assert run("--config", str(file)) == Example(name="a", rank=3, chat=True, values=(7.0,), share=0.25)
    found = run("--config", str(file), "--rank", "4", "--no-chat", "--value", "1,2", "--value", "3")
    assert found == Example(name="a", rank=4, values=(1.0, 2.0, 3.0), share=0.25)


def test_one_on_the_command_line_takes_the_place_of_another_in_the_file(tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text("name: a\nshare: 0.25\nrank: 3\n")
    assert Example.read(file, count=2) == Example(name="a", count=2, rank=3)
    file.write_text("prompts: a.txt\nrule: kl_budget\nkl_budget: 2\nadapter: a\n")
    assert SweepConfig.read(file, adapters={"b": "c"}, rule="reward").adapter is None
    assert SweepConfig.read(file, lambdas=[0.5, -0.0, 0, 0.5]).lambdas == (0.5, 0.0), "each λ once"


def test_what_is_of_python_alone_is_no_key(tmp_path):
    file = tmp_path / "info.yaml"
    file.write_text("base_arguments: {attn_implementation: eager}\n")
    with pytest.raises(DeRaError, match="'base_arguments' is not a key of"):
        InfoSettings.read(file)


def test_options_of_every_type(run, tmp_path):
    found = run(
        "--name", "a", "--kind", "dora", "--folder", str(tmp_path), "--count", "2", "--fold", "--values", "1",
        "--names", "x", "--names", "y", "--models", "b=c", "--models", "d=e", "--more", "f=g=h",
        "--device", "cpu", "--scale", "1e-3",
    )  # fmt: skip
    assert found == Example(
        name="a", kind="dora", folder=tmp_path, count=2, fold=True, values=(1.0,), names=("x", "y"),
        models={"b": "c", "d": "e"}, more={"f": "g=h"}, device="cpu", scale=1e-3,
    )  # fmt: skip


def test_help_and_mistyped_options_teach(run):
    text = CliRunner().invoke(run.app, ["--help"]).output
    assert "Columns of A. Default: 8." in text
    assert "What it is called. Required." in text
    result = CliRunner().invoke(run.app, ["--name", "a", "--rnak", "3"])
    assert result.exit_code == 2
    assert "--rank" in result.output
    with pytest.raises(DeRaError, match="name is missing"):
        run("--rank", "3")


def test_names_that_are_given_twice_and_unknown_choices_are_told(run):
    with pytest.raises(DeRaError, match="--models: the name 'b' is there twice"):
        run("--name", "a", "--models", "b=c", "--models", "b=d")
    result = CliRunner().invoke(run.app, ["--name", "a", "--kind", "pissa"])
    assert result.exit_code == 2
    assert "'plain', 'dora'" in " ".join(result.output.replace("│", " ").split())


COMMANDS = {
    "generate": GenerateSettings, "score": ScoreSettings, "info": InfoSettings, "export": ExportSettings,
    "sweep": SweepSettings, "bench": StepSettings, "bench sweep": SweepTimingSettings,
}  # fmt: skip
TEXTS = {
    "device_map": "cpu",
    "arms": "mixing=weights",
    "mixing": "weights",
    "lambdas": "0.5",
    "max_perplexity": "1.5",
    "lam": "0.5",
    "batch": "2",
    "lambda_schedule": "0:2,20:1",
    "prompts": "2",
    "top": "0.5",
    "plot": "bench.png",
}


def text_of(each: Field, hint: Any) -> str | None:
    """A value on the command line; None for a switch."""
    kinds = alternatives(hint)
    if bool in kinds:
        return None
    literal = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is Literal), None)
    mapping = any(get_origin(kind) is Mapping for kind in kinds)
    number = "1" if int in kinds else "0.5" if float in kinds else None
    return TEXTS.get(each.name) or literal or number or ("name=value" if mapping else "text")


@pytest.mark.parametrize("settings", COMMANDS.values(), ids=COMMANDS)
def test_every_option_of_every_command_takes_a_value_of_its_type(settings, monkeypatch):
    """Each alone: what goes together is checked by the settings as a whole."""
    taken = []
    monkeypatch.setattr(settings, "read", classmethod(lambda cls, config, **given: taken.append(given)))
    app = typer.Typer()
    command(app, settings)(lambda found: None)
    hints = type_hints(settings)
    for each in shown_fields(settings):
        text = text_of(each, hints[each.name])
        arguments = [option_name(each)] if text is None else [option_name(each), text]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        ((name, value),) = taken.pop().items()
        assert name == each.name
        read_value(name, value, hints[name], setting_of(each).check)
