"""The parser of the training programs: TRL's, for its own dataclasses and for this package's settings."""

import os
import types
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import Field, field, fields, make_dataclass
from typing import Any, Literal, NoReturn, cast, get_args, get_origin, get_type_hints

from trl import TrlParser

from dera_peft.errors import DeRaError
from dera_peft.settings import Settings, alternatives, nearest, read_keys, setting_of, type_hints, user_fields

ENVIRONMENT = "env"  # TRL's key for variables of the environment
NOT_GIVEN = object()


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and a description as it is written."""


class RaisingParser(ArgumentParser):
    """Raises what a user did wrong, where argparse prints it under a page of usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise DeRaError(message)


class Parser(RaisingParser, TrlParser):
    """
    Command line over YAML (`--config`) over defaults. Keys may have hyphens or underscores.

    Args:
        command: as the user calls it, "dera sft".
        description: stands at the head of its help page.
        groups: dataclasses of TRL's, or of `Settings`.

    Attributes:
        given: after `read`, the values that file and command line gave, without those of defaults.
    """

    def __init__(self, command: str, description: str, *groups: type):
        self.groups = groups
        self.given: dict[str, Any] = {}
        super().__init__(
            [argparse_form(group) if issubclass(group, Settings) else group for group in groups],
            prog=command,
            usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def read(self, arguments: Sequence[str] | None = None) -> tuple:
        """
        An instance of each group.

        Args:
            arguments: of the command line; `sys.argv`'s unless given.

        Raises:
            DeRaError: an option or a key is not known (with the nearest name), or has an impossible value.
        """
        config = RaisingParser(prog=self.prog, add_help=False, allow_abbrev=False)
        config.add_argument("--config")
        found, arguments = config.parse_known_args(arguments)
        names = sorted({action.dest for action in self._actions} - {"help"})
        of_file = [] if found.config is None else self._set_defaults_from(found.config, names)
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise DeRaError(f"{name!r} follows no option that takes it.")
            raise DeRaError(
                f"{name} is not an option of {self.prog}; {nearest(name.lstrip('-').replace('-', '_'), names)}"
            )
        on_line, _ = self.parse_known_args(arguments, Namespace(**dict.fromkeys(names, NOT_GIVEN)))
        self.given = {
            name: getattr(values, name) for name in names if name in of_file or getattr(on_line, name) is not NOT_GIVEN
        }
        try:
            return tuple(
                group(**{each.name: getattr(values, each.name) for each in fields(form) if each.init})
                for group, form in zip(self.groups, self.dataclass_types, strict=True)
            )
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise DeRaError(" ".join(str(error).split())) from error

    def _set_defaults_from(self, file: str, names: Sequence[str]) -> list[str]:
        """The names of the settings that the file has."""
        values = read_keys(file, [*names, ENVIRONMENT], self.prog)
        variables = values.pop(ENVIRONMENT, {})
        if not isinstance(variables, dict):
            raise DeRaError(f"config={file!r}: {ENVIRONMENT} must hold names with values.")
        os.environ.update({name: str(value) for name, value in variables.items()})
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for name in lists & values.keys():
            if isinstance(values[name], (str, int, float)):
                values[name] = [values[name]]  # as on the command line
        self.set_defaults_with_config(**self._read_of_trl(values, f"config={file!r}"))
        return list(values)

    def _read_of_trl(self, values: dict[str, Any], source: str) -> dict[str, Any]:
        """
        A file's values, those for TRL's settings read as if they stood on the command line: argparse takes defaults as
        they are. This package's own settings read themselves.
        """
        hints = {name: hint for group in self.groups for name, hint in get_type_hints(group).items()}
        own = {each.name for group in self.groups if issubclass(group, Settings) for each in fields(group)}
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        read = dict(values)
        for name, value in values.items():
            kinds = {get_origin(kind) or kind for kind in alternatives(hints[name])}
            if value is None or name in own or (name not in lists and type(value) in kinds & {dict, list}):
                continue
            items = value if isinstance(value, list) and name in lists else [value]
            if any(isinstance(each, (dict, list)) for each in items):
                wanted = "a value or a list of values" if name in lists else "a single value"
                raise DeRaError(f"{source}: {name}={value!r} must be {wanted}.")
            try:
                found = [getattr(self.parse_known_args([f"--{name}={each}"])[0], name) for each in items]
            except DeRaError as error:
                raise DeRaError(f"{source}: {error}") from None
            read[name] = [each for (each,) in found] if name in lists else found[0]
        return read


def argparse_form(settings: type[Settings]) -> type:
    """
    A dataclass with the fields of `settings` as TRL's parser reads them: types that it knows, and metadata that are
    arguments of argparse.
    """
    hints = type_hints(settings)
    shown = [_argparse_field(each, hints[each.name]) for each in user_fields(settings)]
    return make_dataclass(settings.__name__, shown)


def _argparse_field(each: Field, hint: Any) -> tuple[str, Any, Any]:
    about = setting_of(each)
    metadata: dict[str, Any] = {"help": about.help.replace("%", "%%")}
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    if about.metavar is not None and not any(kind is bool or get_origin(kind) is Literal for kind in kinds):
        metadata["metavar"] = about.metavar
    if about.option is not None:
        metadata["aliases"] = [about.option]
    if hint is Any:
        hint = str | None
    if get_origin(hint) is tuple:
        kind, default = get_args(hint)[0], cast("tuple", each.default)
        hint = types.GenericAlias(list, (kind,))
        return each.name, hint, field(default_factory=lambda: list(default), metadata=metadata)
    return each.name, hint, field(default=each.default, metadata=metadata)
