"""The options of a command, made of the fields of its settings (`dera_peft.settings`)."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet
from dera_peft.settings import alternatives, option_name, read_pairs, setting_of, type_hints, user_fields

PANELS = (
    "Model",
    "Prompts",
    "Sampling",
    "What is measured",
    "Measuring",
    "Choosing",
    "Engine",
    "Server",
    "Output",
)  # in this order on a help page

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A YAML file with the settings below; the command line comes before it."),
]


def command(app: typer.Typer, settings: type, name: str | None = None) -> Callable:
    """
    Makes a function of one argument, a `settings`, a command of `app`, with an option for each field and `--config`.

    The function's docstring is the command's help page.
    """

    takes_rest = _rest_of(settings) is not None
    context = {"ignore_unknown_options": True, "allow_extra_args": True} if takes_rest else {}

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        app.command(name, context_settings=context)(_with_options(function, settings))
        return function

    return register


def group(app: typer.Typer, settings: type) -> Callable:
    """As `command`, of what `app` does where none of its own commands is given."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        app.callback(invoke_without_command=True)(_with_options(function, settings))
        return function

    return register


def _with_options(function: Callable[[Any], None], settings: type) -> Callable[..., None]:
    """The function with a signature of which Typer makes the options."""
    shown = shown_fields(settings)
    by_name = {each.name: each for each in shown}
    hints = type_hints(settings)
    rest = _rest_of(settings)

    @functools.wraps(function)
    def run(context: typer.Context, config: Path | None = None, **options: Any) -> None:
        given = {name: value for name, value in options.items() if value not in (None, [])}
        if context.invoked_subcommand is not None:
            if given or config is not None:
                name = context.invoked_subcommand
                place = f"{context.command_path} {name} …"
                raise DeRaError(f"options before {name!r} have no effect; write them behind it: {place}")
            return
        be_quiet()
        values = {name: _parsed(by_name[name], hints[name], value) for name, value in given.items()}
        if context.args and rest is not None:
            values[rest] = (*values.get(rest, ()), *context.args)
        function(settings.read(config, **values))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter("config", keyword, default=None, annotation=Config),
    ]
    parameters += [
        inspect.Parameter(each.name, keyword, default=None, annotation=_annotation(each, hints[each.name]))
        for each in shown
    ]
    run.__signature__ = inspect.Signature(parameters)  # pyrefly: ignore[missing-attribute] # inspect looks for it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _rest_of(settings: type) -> str | None:
    """The field that takes what is no option; None where that is an error."""
    return next((each.name for each in user_fields(settings) if setting_of(each).is_rest), None)


def shown_fields(settings: type) -> list[Field]:
    """The fields that are options, by panel."""
    return sorted(user_fields(settings), key=lambda each: PANELS.index(setting_of(each).panel or PANELS[-1]))


def _annotation(each: Field, hint: Any) -> Any:
    about = setting_of(each)
    kind, is_list = (str, True) if about.parse is not None else _kind(hint)
    names = [option_name(each)]
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"] if about.has_no else names
    elif (own := "--" + each.name.replace("_", "-")) not in names:
        names.append(own)
    option = typer.Option(
        *names,
        metavar="" if kind is bool else about.metavar or _choices(hint),
        help=help_text(each),
        rich_help_panel=about.panel or PANELS[-1],
        show_default=False,
    )
    return Annotated[(list[kind] if is_list else kind) | None, option]


def help_text(each: Field) -> str:
    """What a setting is for, with its default."""
    text, default = setting_of(each).help, default_text(each)
    if default is None:
        return text
    return f"{text} Required." if each.default is MISSING else f"{text} Default: {default}."


def default_text(each: Field) -> str | None:
    """A default as the help page and the reference show it; None where it says nothing."""
    default = each.default
    if default is MISSING:
        return "required" if each.default_factory is MISSING else None
    if default is None or default == () or isinstance(default, bool):
        return None
    values = default if isinstance(default, tuple) else (default,)
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _kind(hint: Any) -> tuple[Any, bool]:
    """What Typer makes of one value on the command line, and whether the option may be repeated."""
    for kind in alternatives(hint):
        if get_origin(kind) is tuple:
            item = _kind(get_args(kind)[0])[0]
            return (str if get_origin(item) is Literal else item), True  # Typer knows no list of literals
        if _is_mapping(kind):
            return str, True
        # the normalized names of options, in which "_" is "-", would be shown for choices too
        is_choice = get_origin(kind) is Literal and not any("_" in choice for choice in get_args(kind))
        if kind in (bool, int, float, str, Path) or is_choice:
            return kind, False
    return str, False


def _is_mapping(kind: Any) -> bool:
    return isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping)


def _choices(hint: Any) -> str | None:
    return next(("|".join(get_args(kind)) for kind in alternatives(hint) if get_origin(kind) is Literal), None)


def _parsed(each: Field, hint: Any, value: Any) -> Any:
    about = setting_of(each)
    if about.parse is not None:
        return about.parse(value)
    if any(map(_is_mapping, alternatives(hint))):
        return read_pairs(option_name(each), value)
    return tuple(value) if isinstance(value, list) else value
