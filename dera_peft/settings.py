"""
Settings, each declared once: a field of a dataclass with its type, default, help and check.

From the field come the option of the command line (`cli.options`), the key of a YAML file, the check of the Python
argument and a line of the reference page. One precedence holds everywhere: command line, then YAML, then default.
"""

import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from dera_peft.errors import DeRaError
from dera_peft.formatting import short_repr

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
KEY = "setting"  # in a field's metadata
WRONG = object()  # what `_convert` makes of a value of another type
FLOAT_MAX = sys.float_info.max
MOST_NAMES = 60  # that a message lists


@dataclass(frozen=True)
class Check:
    """
    What a value must fulfil beside its type.

    Attributes:
        holds: of a value that has the type.
        wanted: completes "must be …".
        names_type: whether `wanted` names the type too. It is then also the message for a value of another type.
    """

    holds: Callable[[Any], bool]
    wanted: str
    names_type: bool = False


AT_LEAST_1 = Check(lambda value: value >= 1, "at least 1")
COUNT = Check(lambda value: value >= 1, "an integer of at least 1", names_type=True)


@dataclass(frozen=True)
class Setting:
    """
    What a field says of itself beside its name, type and default.

    Attributes:
        help: one or two sentences.
        check: what its value must fulfil.
        metavar: stands for the value on a help page.
        panel: heading under which a help page lists it.
        option: its name on the command line, beside that of the field.
        parse: makes the value of the texts that the command line gave, where an option may be repeated or has a form of
            its own.
        normalize: makes of a checked value the one that is kept.
        has_no: whether a switch has a `--no-` form, for what a file says.
        on_command_line: False for a value of Python alone, which is neither an option nor a key.
        is_rest: whether what a command line has beside the options is added to it.
    """

    help: str
    check: Check | None = None
    metavar: str | None = None
    panel: str | None = None
    option: str | None = None
    parse: Callable[[Sequence[str]], Any] | None = None
    normalize: Callable[[Any], Any] | None = None
    has_no: bool = True
    on_command_line: bool = True
    is_rest: bool = False


def setting(default: Any = MISSING, help: str = "", **values: Any) -> Any:
    """A field of a settings dataclass, required without a default. `values` are further attributes of `Setting`."""
    metadata = {KEY: Setting(help, **values)}
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def setting_like(kind: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """A field as `kind` declares it, perhaps with another default. `changes` are attributes of `Setting`."""
    found = next(each for each in fields(kind) if each.name == name)
    return setting(found.default if default is MISSING else default, **vars(replace(setting_of(found), **changes)))


class Settings:
    """Base of the settings' dataclasses: every field is checked, and converted to its type."""

    def __init_subclass__(cls):
        # where a class has one of its own, dataclasses makes none
        cls.__repr__ = short_repr  # pyrefly: ignore[bad-assignment] # it is of any dataclass

    called: ClassVar[str] = "this command"  # whose settings they are, for messages
    # of each of these groups one is enough: one on the command line takes the place of another in the file
    instead: ClassVar[tuple[tuple[str, ...], ...]] = ()
    __dataclass_fields__: ClassVar[dict[str, Field]]  # every subclass is a dataclass

    def __post_init__(self):
        hints = type_hints(type(self))
        for each in fields(self):
            about = setting_of(each)
            value = read_value(each.name, getattr(self, each.name), hints[each.name], about.check)
            object.__setattr__(self, each.name, value if about.normalize is None else about.normalize(value))

    @classmethod
    def read(cls, file: str | os.PathLike | None = None, **given: Any) -> Self:
        """
        Settings from a YAML file, with those of `given` that are not None before it. A key may have hyphens.

        Raises:
            DeRaError: no such file, not a mapping, a key that is not one (with the nearest name), or a missing one.
        """
        settings = {} if file is None else read_keys(file, [each.name for each in user_fields(cls)], cls.called)
        settings = cls.merge(settings, {name: value for name, value in given.items() if value is not None})
        for each in fields(cls):
            if each.default is MISSING and each.default_factory is MISSING and each.name not in settings:
                raise DeRaError(f"{each.name} is missing: set it in the config or with {option_name(each)}.")
        return cls(**settings)

    @classmethod
    def merge(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """The settings of a file, `values`, with those of the command line before them."""
        groups = [group for kind in cls.__mro__ for group in vars(kind).get("instead", ())]
        replaced = {name for group in groups if not given.keys().isdisjoint(group) for name in group}
        return {**{name: value for name, value in values.items() if name not in replaced}, **given}


def user_fields(kind: type) -> list[Field]:
    """The fields that a command line and a file may set, as against those of Python alone."""
    return [each for each in fields(kind) if setting_of(each).on_command_line]


def setting_of(each: Field) -> Setting:
    return each.metadata[KEY]


@cache
def type_hints(kind: type) -> dict[str, Any]:
    """The fields' types, those of base classes too."""
    return get_type_hints(kind)


def part(settings: Any, kind: type[T]) -> T:
    """The settings of one of the dataclasses that `settings` inherits from, as an instance of that."""
    return kind(**{each.name: getattr(settings, each.name) for each in fields(kind)})


# -- the check of a value ----------------------------------------------------------------------------------------------


def read_value(name: str, value: Any, hint: Any, check: Check | None = None) -> Any:
    """
    A value as its type has it: numbers as int or float, a path as text, a list as tuple.

    Raises:
        DeRaError: it has another type, or the check does not hold; names the setting, the value and what is wanted.
    """
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    optional = len(kinds) < len(alternatives(hint))
    value = plain(value)
    if kinds == [Any] or (value is None and optional):
        return value
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple:
        return _read_items(name, value, get_args(kinds[0])[0], check)
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        if _convert(value, kinds[0]) is WRONG:
            choices = ", ".join(map(str, get_args(kinds[0])))
            raise DeRaError(f"{name}={value!r} is not known; choose one of {choices}.")
        return value
    converted = _convert_to_any(value, kinds)
    if converted is not WRONG and (check is None or check.holds(converted)):
        return converted
    if check is not None and (converted is not WRONG or check.names_type):
        wanted = check.wanted
    else:
        wanted = " or ".join(dict.fromkeys(map(describe_type, kinds)))
    raise DeRaError(f"{name}={value!r} must be {wanted}{', or left out' if optional else ''}.")


def plain(value: Any) -> Any:
    """Python's own number or list of one of numpy, torch or pandas, which share this method; any other as it is."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _read_items(name: str, value: Any, hint: Any, check: Check | None) -> tuple:
    """One value, or a list of them."""
    kinds = alternatives(hint)
    items = []
    for each in value if isinstance(value, (list, tuple, range)) else (value,):
        item = _convert_to_any(plain(each), kinds)
        if item is WRONG:
            wanted = " or ".join(map(describe_type, kinds))
            raise DeRaError(f"{name}: {each!r} is not one of what it may hold: {wanted}.")
        items.append(item)
    if check is not None and not check.holds(tuple(items)):
        raise DeRaError(f"{name}={value!r} must be {check.wanted}.")
    return tuple(items)


def alternatives(hint: Any) -> tuple:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert_to_any(value: Any, kinds: Sequence[Any]) -> Any:
    return next((found for kind in kinds if (found := _convert(value, kind)) is not WRONG), WRONG)


def _convert(value: Any, kind: Any) -> Any:
    """The value as `kind`, or WRONG where it is of another type."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else WRONG
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT_MAX
        return float(value) if is_number else WRONG
    if kind is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return text if isinstance(text, str) else WRONG
    if kind is Path:
        return Path(value) if isinstance(value, (str, os.PathLike)) else WRONG
    if origin is Literal:
        return value if value in get_args(kind) and not isinstance(value, bool) else WRONG
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return WRONG
        names, values = get_args(kind)
        items = {_convert(name, names): _convert(item, values) for name, item in value.items()}
        return WRONG if any(each is WRONG for pair in items.items() for each in pair) else items
    return value if isinstance(value, kind) else WRONG


def describe_type(kind: Any) -> str:
    """A type in words: "an integer", "a list of texts"."""
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", Path: "a path"}
    if kind in words:
        return words[kind]
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    if origin is not None and issubclass(origin, Mapping):
        return "names with values"
    if kind is Callable:
        return "a function"
    return f"a {kind.__name__}"


# -- YAML, and names ---------------------------------------------------------------------------------------------------


def read_yaml(file: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise DeRaError(f"config={os.fspath(file)!r}: there is no such file.") from None
    except OSError as error:
        raise DeRaError(f"config={os.fspath(file)!r} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that is none, of a number with a tag
        raise DeRaError(f"config={os.fspath(file)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise DeRaError(f"config={os.fspath(file)!r} must hold keys with values.")
    return values


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"), list("-+.0123456789")
)


def read_keys(file: str | os.PathLike, names: Sequence[str], called: str) -> dict[str, Any]:
    """
    The values in a YAML file by the names of their settings. A key may have hyphens.

    Args:
        names: of the settings that there are.
        called: whose settings they are, for messages.

    Raises:
        DeRaError: no such file, not a mapping, or a key that is not one (with the nearest name) or is there twice.
    """
    values: dict[str, Any] = {}
    for key, value in read_yaml(file).items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise DeRaError(f"config={os.fspath(file)!r}: {key!r} is not a key of {called}; {nearest(name, names)}")
        if name in values:
            raise DeRaError(f"config={os.fspath(file)!r}: {name!r} is there twice.")
        values[name] = value
    return values


def option_name(each: Field) -> str:
    """`max_new_tokens` -> `--max-new-tokens`, unless the setting names its option."""
    return setting_of(each).option or "--" + each.name.replace("_", "-")


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known name that was meant, or all of them, unless they are very many."""
    if close := get_close_matches(name, known, n=1):
        return f"do you mean {close[0]!r}?"
    return f"there are {', '.join(sorted(known))}." if len(known) <= MOST_NAMES else "see --help."


def read_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`["retrained=runs/dpo-2"]` -> {"retrained": "runs/dpo-2"}."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise DeRaError(f"{option}: {text!r} is not of the form name=value.")
        if name in pairs:
            raise DeRaError(f"{option}: the name {name!r} is there twice; give each its own.")
        pairs[name] = value
    return pairs
