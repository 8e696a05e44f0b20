"""λ as a request has it, a number or one by name for each of several adapters; and as settings and texts say it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any, cast

from dera_peft.engine.rules import MAX_LAMBDA, read_number
from dera_peft.errors import DeRaError
from dera_peft.settings import Check, nearest, plain, setting

FORMS = "write 0,0.5,1 for one adapter; for several name=λ,name=λ, and repeat the option for another point"


class NamedLambda(Mapping[str, float]):
    """
    λ of several adapters, by name: immutable and hashable, so that it can be part of a key.

    It equals every mapping of the same names and values, in any order. `str` is its form on a command line,
    `helpful=0.7,harmless=0.3`; a format's specification is that of each value. One point is less than another by the
    values in the order of their names.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, float]):
        self._values = {name: float(value) + 0.0 for name, value in values.items()}  # -0.0 is 0.0

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __lt__(self, other: "NamedLambda") -> bool:
        return tuple(self.values()) < tuple(other.values())

    def __format__(self, specification: str) -> str:
        return ",".join(f"{name}={value:{specification}}" for name, value in self.items())

    def __str__(self) -> str:
        return format(self)

    def __repr__(self) -> str:
        return repr(self._values)


Lambda = float | NamedLambda  # of one aligned adapter; of several


def is_lambda(value: Any) -> bool:
    """Whether it is a number, numpy's too, and finite in fp32 too."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(cast("float", value)) <= MAX_LAMBDA


def _is_point_or_grid(value: Any) -> bool:
    """A number; or names with numbers, or with lists of them."""
    if not isinstance(value, Mapping):
        return is_lambda(value)
    parts = [part if isinstance(part, (list, tuple)) else [part] for part in map(plain, value.values())]
    return bool(parts) and all(part and all(map(is_lambda, part)) for part in parts)


LAMBDAS = Check(
    lambda values: all(map(_is_point_or_grid, values)),
    "finite numbers, as [0, 0.5, 1]; of several adapters points, as [{helpful: 0.7, harmless: 0.3}], or a list for "
    "each, as {helpful: [0, 0.5], harmless: [0, 1]}, for all their combinations",
)


def lambdas_setting(default: tuple[float, ...], help: str, panel: str) -> Any:
    """
    The λ of a run, `tuple[float | Mapping[str, Any], ...]`: `--lambda 0,0.5 --lambda 1` on the command line, and
    `--lambda helpful=0.7,harmless=0.3` for a point of several adapters. `for_adapters` makes them a model's own.
    """
    help = f"{help} With commas, or the option repeated."
    return setting(
        default, help, check=LAMBDAS, metavar="λ[,λ…]", panel=panel, option="--lambda", parse=read_lambdas,
        normalize=unique,
    )  # fmt: skip


def unique(lambdas: Iterable[float | Mapping[str, Any]]) -> tuple[Lambda, ...]:
    """Each once, in their order; of names with lists, all combinations. -0.0 is 0.0."""
    points: list[Lambda] = []
    for lam in lambdas:
        if not isinstance(lam, Mapping):
            points.append(lam + 0.0)
            continue
        axes = [axis if isinstance(axis, (list, tuple)) else [axis] for axis in map(plain, lam.values())]
        points += [NamedLambda(dict(zip(lam, values, strict=True))) for values in product(*axes)]
    return tuple(dict.fromkeys(points))


def for_adapters(
    lambdas: Iterable[float | Mapping[str, Any]], aligned: Sequence[str], argument: str = "--lambda"
) -> tuple[Lambda, ...]:
    """
    λ as the requests of a model have them: of one aligned adapter numbers; of several all of them by name, in their
    order, with 0 for one that is not named.

    Args:
        aligned: the names of the model's aligned branches.
        argument: where the λ were given, for messages.

    Raises:
        DeRaError: a name is not one of them, or a number is given and there are several.
    """
    points: list[Lambda] = []
    for lam in unique(lambdas):
        if isinstance(lam, NamedLambda):
            if unknown := [name for name in lam if name not in aligned]:
                raise DeRaError(
                    f"{argument}: λ is given for {unknown[0]!r}, which is not an aligned adapter of this model; "
                    f"{nearest(unknown[0], aligned)}"
                )
            points.append(
                NamedLambda({name: lam.get(name, 0.0) for name in aligned}) if len(aligned) > 1 else lam[aligned[0]]
            )
        elif len(aligned) > 1:
            example = ",".join(f"{name}={lam:g}" for name in aligned)
            raise DeRaError(
                f"{argument}: λ={lam:g} is one number, and the model has several aligned adapters, {list(aligned)}: "
                f"give each its own by name, as {example}."
            )
        else:
            points.append(lam)
    return tuple(dict.fromkeys(points))


def read_lambdas(texts: Sequence[str], argument: str = "--lambda") -> list[Lambda]:
    """`["0,0.5", "1"]` -> [0.0, 0.5, 1.0]; `["helpful=0.7,harmless=0.3"]` -> one point."""
    lambdas: list[Lambda] = []
    for text in texts:
        if "=" in text:
            lambdas.append(_read_point(text, argument))
        else:
            lambdas += [_read_number(part, text, argument) for part in text.split(",")]
    return lambdas


def read_lambda(texts: Sequence[str], argument: str = "--lambda") -> Lambda:
    """A single one: `["0.6"]` -> 0.6; `["helpful=0.7,harmless=0.3"]` -> a point. `argument` is for messages."""
    lambdas = read_lambdas(texts, argument)
    if len(lambdas) > 1:
        raise DeRaError(f"{argument}: {' '.join(texts)!r} is {len(lambdas)} λ, and one is wanted.")
    return lambdas[0]


def _read_point(text: str, argument: str) -> NamedLambda:
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise DeRaError(f"{argument}: {text!r}: {part.strip()!r} is not of the form name=λ; {FORMS}.")
        if name in values:
            raise DeRaError(f"{argument}: {text!r} names {name!r} twice; {FORMS}.")
        values[name] = _read_number(value, text, argument)
    return NamedLambda(values)


def _read_number(part: str, text: str, argument: str) -> float:
    try:
        value = read_number(part.strip())
    except ValueError:
        of = f"{text!r}: " if part.strip() != text.strip() else ""
        raise DeRaError(f"{argument}: {of}{part.strip()!r} is not a number; {FORMS}.") from None
    if not is_lambda(value):
        raise DeRaError(f"{argument}: {part.strip()!r} is not finite in fp32, in which logits are mixed.")
    return value


# -- points of several adapters ----------------------------------------------------------------------------------------


def values_of(lam: Lambda) -> tuple[float, ...]:
    """One for each adapter."""
    return tuple(lam.values()) if isinstance(lam, NamedLambda) else (lam,)


def with_values(lam: Lambda, values: Iterable[float]) -> Lambda:
    """Of the same adapters."""
    if isinstance(lam, NamedLambda):
        return NamedLambda(dict(zip(lam, values, strict=True)))
    (value,) = values
    return value


def covering(lambdas: Sequence[Lambda]) -> Lambda:
    """A λ that needs every branch that any of these needs, and none beside; of one λ that itself."""
    if len(set(lambdas)) == 1:
        return lambdas[0]
    columns = list(zip(*map(values_of, lambdas), strict=True))
    used = [any(column) for column in columns]
    needs_reference = any(sum(values_of(lam)) != 1 for lam in lambdas)
    share = 1 / (sum(used) + needs_reference)
    return with_values(lambdas[0], (share if is_used else 0.0 for is_used in used))
