"""λ of a request, from its field `lambda` or from the model's name: `dpo@0.5`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import Lambda, NamedLambda, is_lambda
from dera_peft.engine.rules import read_number
from dera_peft.serve.errors import APIError
from dera_peft.serve.settings import folder_name

AT, PLUS = "@", "+"


@dataclass(frozen=True)
class ModelNames:
    """
    The names that clients know the adapters by.

    Attributes:
        branches: served name -> the name of its aligned branch. A single adapter is served by its folder's name. Empty
            for a base without an adapter, for which there is no λ.
        base: the base's name; of a model without adapters its only one.
        default: λ of the model where a request names none.
        lambda_range: the least and the greatest λ.
        listed: λ that `listing` shows each adapter with.
    """

    branches: Mapping[str, str]
    base: str
    default: float | Mapping[str, float]
    lambda_range: tuple[float, float]
    listed: Sequence[float] = ()

    @property
    def plain(self) -> str:
        """The name without λ: of several adapters all of theirs."""
        return PLUS.join(self.branches) or self.base

    def listing(self, lambdas: Sequence[float] | None = None) -> list[str]:
        """Plain names first, then those with λ: these, or `listed`."""
        lambdas = self.listed if lambdas is None else lambdas
        plain = [*self.branches, *([self.plain] if len(self.branches) != 1 else [])]
        return [*plain, *(f"{name}{AT}{lam:g}" for name in self.branches for lam in lambdas)]

    def read(self, model: str | None, lam: Any = None) -> Lambda | None:
        """
        λ of a request, a number, or of several adapters one by branch; None where there is no adapter.

        Args:
            model: a served name, with or without λ; several with "+" between them. None for all of them.
            lam: the field `lambda`: a number, or numbers by served name.

        Raises:
            APIError: it is not a number in the range, or there is no such name.
        """
        if not self.branches:
            return self._check_without_adapter(model, lam)
        named = self._read_name(self.plain if model is None else model)
        given = {name: value for name, value in named.items() if value is not None}
        if lam is not None and given:
            raise APIError(
                f"lambda: the model's name, {model!r}, says λ already: leave one of the two away", param="lambda"
            )
        if isinstance(lam, Mapping):
            wrong = [name for name in lam if name in self.branches and name not in named]
            if wrong or not lam:
                said = (
                    f"names {wrong[0]!r}, which is not in the model's name, {model!r}" if wrong else "names no adapter"
                )
                raise APIError(f"lambda: it {said}", param="lambda")
            return self._of_branches({self._known(name, "lambda"): self.number(lam[name], "lambda") for name in lam})
        if lam is not None:
            value = self.number(lam, "lambda")
            if len(named) > 1:
                raise APIError(
                    f"lambda: one number says too little for several adapters: give each its own, as "
                    f"{dict.fromkeys(named, value)}",
                    param="lambda",
                )
            return self._of_branches(dict.fromkeys(named, value))
        is_alone = len(named) == 1 < len(self.branches)  # one of several, by itself: as it was trained
        said = {
            name: value if value is not None else 1.0 if is_alone else self._default(name)
            for name, value in named.items()
        }
        return self._of_branches(said)

    def shown(self, lam: Lambda | None) -> float | dict[str, float] | None:
        """λ by branch as λ by served name, for JSON."""
        if not isinstance(lam, NamedLambda):
            return lam
        return {name: lam[branch] for name, branch in self.branches.items()}

    def _check_without_adapter(self, model: str | None, lam: Any) -> None:
        if model not in (None, self.base):
            raise APIError(
                f"model: there is no {model!r}; there is {self.base!r}, without an adapter and so without λ", 404,
                param="model", code="model_not_found",
            )  # fmt: skip
        if lam is not None:
            raise APIError(
                "lambda: this model has no adapter, so λ would change nothing: leave it away", param="lambda"
            )

    def _read_name(self, model: str) -> dict[str, float | None]:
        """Served name -> λ, None where the name says none."""
        if model in self.branches:
            return {model: None}
        found: dict[str, float | None] = {}
        for part in model.split(PLUS):
            name, at, value = part.rpartition(AT)
            name = name if at else part
            if name in found:
                raise APIError(f"model: {model!r} names {name!r} twice", param="model")
            self._known(name, "model")
            found[name] = None
            if at:
                try:
                    found[name] = self.number(read_number(value), "model")
                except ValueError as error:
                    raise APIError(f"model: in {model!r}, {error}", param="model") from None
        return found

    def _known(self, name: str, param: str) -> str:
        if name not in self.branches:
            # a model that is not there has a status of its own; a wrong name in `lambda` is a wrong value
            status, code = (404, "model_not_found") if param == "model" else (400, None)
            raise APIError(
                f"{param}: there is no {name!r}; there are {', '.join(self.branches)}, each also as name@λ", status,
                param=param, code=code,
            )  # fmt: skip
        return name

    def number(self, value: Any, param: str) -> float:
        """λ in the range. Raises `APIError`, which names `param`."""
        low, high = self.lambda_range
        if not is_lambda(value):
            raise APIError(f"{param}: λ must be a finite number; got {value!r}", param=param)
        if not low <= value <= high:
            raise APIError(f"{param}: λ={value:g} is out of range; this server takes {low:g} to {high:g}", param=param)
        return float(value) + 0.0  # -0.0 is 0.0

    def _default(self, name: str) -> float:
        if isinstance(self.default, Mapping):
            return self.default.get(self.branches[name], 0.0)
        return self.default

    def _of_branches(self, lam: Mapping[str, float]) -> Lambda:
        """One that is not named is left out of the mixture: 0."""
        if len(self.branches) == 1:
            return next(iter(lam.values()), 0.0)
        return NamedLambda({branch: lam.get(name, 0.0) for name, branch in self.branches.items()})


def served_names(source: ModelSource, aligned: Sequence[str]) -> dict[str, str]:
    """Served name -> aligned branch: an adapter's own name, else that of its folder; see `ModelNames`."""
    if len(aligned) > 1 or source.adapters is not None:
        return {name: name for name in aligned}
    name = folder_name(source.name)
    for mark in (AT, PLUS):
        name = name.replace(mark, "_")
    return {name: aligned[0]}
