"""
The page of all commands and their settings, made from the dataclasses that declare them.

    python tests/settings_page.py > docs/reference/settings.md
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.app import app
from dera_peft.cli.generate import PromptSettings
from dera_peft.cli.options import PANELS, default_text, shown_fields
from dera_peft.decoding.sampling import Sampling
from dera_peft.settings import KEY, Settings, alternatives, option_name, setting_of, type_hints
from dera_peft.training import distill, distillation, dpo, preferences, sft, trainer

SHARED = {"Model": ModelSource, "Sampling": Sampling, "Prompts": PromptSettings}  # by their headings on the page
TRAINING = {  # each program's module, and what its keys are besides those that the module declares
    "sft": (sft, [trainer.SFTConfig, trainer.ModelConfig]),
    "preferences": (preferences, []),
    "dpo": (dpo, [trainer.DPOConfig, trainer.ModelConfig]),
    "distill": (distill, [distillation.DistillationConfig]),
}
TRL = {  # whose keys a training command takes too
    "SFTConfig": "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
    "DPOConfig": "https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig",
    "DistillationConfig": "https://huggingface.co/docs/trl/distillation_trainer#trl.DistillationConfig",
    "ModelConfig": "https://huggingface.co/docs/trl/script_utils#trl.ModelConfig",
}
NONE = "–"
REPEATED = " With commas, or the option repeated."  # of an option alone

INTRODUCTION = """# Commands and settings

Made by `python tests/settings_page.py > docs/reference/settings.md` from the code: do not edit it by hand.
`dera COMMAND --help` shows the same settings with examples.

A setting is declared once, so its option, its key in a YAML file and its Python argument have one type, default and
check. Key and argument have one name, and so has the option; one that can be repeated (`--lambda`, `--reward`,
`--arm`) has the singular too. A value on the command line comes before one in the file of `--config`, and that before
the default. Options may be written with hyphens or underscores (`--max-new-tokens`, `--max_new_tokens`), and so may
keys. An option or key that does not exist is an error that names the nearest one.

<div class="settings" markdown>
"""
SHARED_TEXT = {
    "Model": "Which base and which adapters. In Python these are the fields of `ModelSource` and the arguments of "
    "`DeRaModel.from_pretrained`.",
    "Sampling": "How tokens are drawn. In Python these are the fields of `Sampling`.",
    "Prompts": "Where `dera generate` and `dera export` read prompts. `dera generate` also reads the lines of standard "
    "input.",
}
TRAINING_TEXT = """The training commands run TRL's trainers, and take TRL's keys: {trl}. The tables below list the
keys that this project adds or changes. `--config FILE` names a YAML file with these keys; on the command line, which
comes first, a key is the option of its name: `--beta 0.1`, `--use_peft true`, `--lora_target_modules q_proj v_proj`.
"""


def main() -> None:
    print(INTRODUCTION)
    print("## All commands\n")
    print_options(app.registered_callback.callback)
    print("## Shared settings\n\nSeveral commands take these.\n")
    for title, settings in SHARED.items():
        print(f"### {title}\n\n{SHARED_TEXT[title]}\n")
        print_settings(shown_fields(settings), settings)
    for name, callback in commands(app):
        print(f"## dera {name}\n\n{summary(callback.__doc__)}\n")
        settings = settings_of(callback)
        if settings is None:
            print_options(callback)
        else:
            print_command(settings)
    print("## Training commands\n")
    links = [f"[`{name}`]({url})" for name, url in TRL.items()]
    print(TRAINING_TEXT.format(trl=", ".join(links)))
    for name, (module, further) in TRAINING.items():
        print(f"## dera {name}\n\n{summary(module.__doc__)}\n")
        own = [each for each in vars(module).values() if is_dataclass(each) and each.__module__ == module.__name__]
        print_training([*own, *further])
    print("</div>")


# -- commands whose settings are a dataclass ---------------------------------------------------------------------------


def commands(of: typer.Typer) -> Iterator[tuple[str, Callable]]:
    """Names and functions in the order of `dera --help`; those of a group after it, those of training left out."""
    for command in of.registered_commands:
        name = command.name or command.callback.__name__
        if name not in TRAINING:
            yield name, command.callback
    for group in of.registered_groups:
        yield group.name, group.typer_instance.registered_callback.callback
        for name, callback in commands(group.typer_instance):
            yield f"{group.name} {name}", callback


def settings_of(callback: Callable) -> type[Settings] | None:
    """The dataclass that a command was made from by `cli.options.command`."""
    function = inspect.unwrap(callback)
    hints = get_type_hints(function).values()
    return next((hint for hint in hints if isinstance(hint, type) and issubclass(hint, Settings)), None)


def print_command(settings: type[Settings]) -> None:
    shared = [title for title, kind in SHARED.items() if issubclass(settings, kind)]
    inherited = {each.name for title in shared for each in fields(SHARED[title])}
    print("`--config FILE` names a YAML file with the keys below.", end="")
    links = [f"[{title}](#{title.lower()})" for title in shared]
    print(f" It also takes the settings of {' and '.join(', '.join(links).rsplit(', ', 1))}.\n" if links else "\n")
    for panel in PANELS:
        own = [
            each
            for each in shown_fields(settings)
            if (setting_of(each).panel or PANELS[-1]) == panel and each.name not in inherited
        ]
        if own:
            print(f"**{panel}**\n")
            print_settings(own, settings)
            for each in own:
                print_items(each, type_hints(settings)[each.name])


def print_items(of: Field, hint: Any) -> None:
    """The keys of a list's items, where those are settings of their own."""
    item = next(iter(get_args(hint)), None)
    if isinstance(item, type) and issubclass(item, Settings):
        hints = type_hints(item)
        print(f"An item of `{of.name}` has the keys\n")
        rows = [
            [f"`{each.name}`", type_text(hints[each.name]), setting_of(each).help.removesuffix(REPEATED)]
            for each in fields(item)
        ]
        print_table(["key", "type", ""], rows)


def print_settings(shown: Sequence[Field], settings: type) -> None:
    hints = type_hints(settings)
    rows = []
    for each in shown:
        option = option_name(each)
        name = f"`{option}`"
        if hints[each.name] in (bool, bool | None):
            name += f", `--no-{option[2:]}`"
        rows.append([name, f"`{each.name}`", type_text(hints[each.name]), default_cell(each), setting_of(each).help])
    print_table(["option", "key", "type", "default", ""], rows)


def default_cell(each: Field) -> str:
    if isinstance(each.default, bool):
        return f"`{each.default}`".lower()
    text = default_text(each)
    return text if text == "required" else NONE if text is None else f"`{text}`"


def type_text(hint: Any) -> str:
    """A type in words, without None."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    return " or ".join(dict.fromkeys(map(_type_word, kinds)))


def _type_word(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        items = [type_text(kind) for kind in alternatives(arguments[0])]
        return "list of " + " or ".join(
            item if item.startswith("`") or item.endswith("by name") else f"{item}s" for item in items
        )
    if origin is not None and issubclass(origin, Mapping):
        return "values by name" if arguments[1] is Any else f"{type_text(arguments[1])} by name"
    if kind is Callable or origin is Callable:
        return "function"
    if is_dataclass(kind):
        return "mapping"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


# -- training, whose dataclasses are read by TRL's parser --------------------------------------------------------------


def print_training(kinds: Sequence[type]) -> None:
    """The keys that classes of this project declare, those of its classes above TRL's too."""
    rows = []
    for kind in kinds:
        hints = get_type_hints(kind)
        by_name = {each.name: each for each in fields(kind)}
        own = [base for base in kind.__mro__ if base.__module__.startswith("dera_peft.")]
        for name in dict.fromkeys(name for base in own for name in vars(base).get("__annotations__", {})):
            each = by_name.get(name)
            about = None if each is None else each.metadata.get(KEY)
            if each is None or (about is not None and not about.on_command_line):
                continue
            text = about.help if about is not None else each.metadata.get("help", "").replace("%%", "%")
            choices = each.metadata.get("choices")
            of = ", ".join(f"`{value}`" for value in choices) if choices else type_text(hints[name])
            default = each.default if each.default_factory is MISSING else each.default_factory()
            rows.append([f"`{name}`", of, value_cell(default), " ".join(text.split())])
    print_table(["key", "type", "default", ""], rows)


def value_cell(default: Any) -> str:
    if default is MISSING:
        return "required"
    if default in (None, [], (), {}):
        return NONE
    if isinstance(default, bool):
        return f"`{default}`".lower()
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


# -- commands whose options are a function's arguments -----------------------------------------------------------------


def print_options(callback: Callable) -> None:
    panels: dict[str, list[list[str]]] = {}
    for name, parameter in inspect.signature(callback).parameters.items():
        about = next((each for each in get_args(parameter.annotation) if isinstance(each, OptionInfo)), None)
        if about is not None:
            # in an annotation the first name stands where a default would
            named = [each for each in (about.default, *(about.param_decls or ())) if isinstance(each, str)]
            option = next(iter(named), "--" + name.replace("_", "-"))
            kind = type_text(get_args(parameter.annotation)[0])
            row = [f"`{option}`", kind, value_cell(parameter.default), about.help or ""]
            panels.setdefault(about.rich_help_panel or PANELS[-1], []).append(row)
    for panel in sorted(panels, key=PANELS.index):
        if len(panels) > 1:
            print(f"**{panel}**\n")
        print_table(["option", "type", "default", ""], panels[panel])


# -- text --------------------------------------------------------------------------------------------------------------


def summary(docstring: str) -> str:
    """The first paragraph."""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |")
    for row in rows:
        print(f"| {' | '.join(escape(cell) for cell in row)} |")
    print()


def escape(cell: str) -> str:
    return cell.replace("|", r"\|").replace("*", r"\*")


if __name__ == "__main__":
    main()
