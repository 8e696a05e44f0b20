"""λ as numbers of a request, and as texts of a command line."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

from dera_peft.errors import DeRaError
from dera_peft.settings import Check, setting

MAX_LAMBDA = (2 - 2**-23) * 2.0**127  # the largest float32: logits are mixed in fp32


def is_lambda(value: Any) -> bool:
    """Whether it is a number, numpy's too, and finite in fp32 too."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(cast("float", value)) <= MAX_LAMBDA


FINITE = Check(lambda values: all(map(is_lambda, values)), "finite numbers")


def lambdas_setting(default: tuple[float, ...], help: str, panel: str) -> Any:
    """The λ of a run, `tuple[float, ...]`: `--lambda 0,0.5 --lambda 1` on the command line."""
    help = f"{help} With commas, or the option repeated."
    return setting(
        default, help, check=FINITE, metavar="λ[,λ…]", panel=panel, option="--lambda", parse=read_lambdas,
        normalize=unique,
    )  # fmt: skip


def unique(lambdas: Sequence[float]) -> tuple[float, ...]:
    """Each once, in their order; -0.0 is 0.0."""
    return tuple(dict.fromkeys(lam + 0.0 for lam in lambdas))


def read_lambdas(texts: Sequence[str]) -> list[float]:
    """`["0,0.5", "1"]` -> [0.0, 0.5, 1.0]."""
    values: list[float] = []
    for part in ",".join(texts).split(","):
        try:
            value = float(part)
        except ValueError:
            raise DeRaError(
                f"--lambda: {part.strip()!r} is not a number; write numbers with commas, as 0,0.5,1."
            ) from None
        if not is_lambda(value):
            raise DeRaError(f"--lambda: {part.strip()!r} is not finite in fp32, in which logits are mixed.")
        values.append(value)
    return values


def read_lambda_by_name(texts: Sequence[str]) -> float | dict[str, float]:
    """`["0.6"]` -> 0.6; `["helpful=0.7,harmless=0.2"]` -> a dict by adapter."""
    text = ",".join(texts)
    named: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not is_lambda(number) or (not equals and "," in text):
            raise DeRaError(f"--lambda: {text!r} is not a number, nor name=number for each adapter with commas.")
        if not equals:
            return number
        named[name.strip()] = number
    return named
