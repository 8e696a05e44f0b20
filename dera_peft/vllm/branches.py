"""What vLLM's processes know of a model: its adapters, its branches, and which λ a request may have."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from dera_peft.checkpoint.fingerprint import weights_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.decoding.lambdas import NamedLambda, for_adapters, is_lambda, read_lambda
from dera_peft.engine.names import LOGITS
from dera_peft.engine.plan import Branch
from dera_peft.engine.rules import LINEAR
from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "dera"  # of vLLM's additional_config
LAMBDA = "lambda"  # of a request's extra_args
_PROMPTS = "a prompt of the reference's own is not decoded inside vLLM; dera generate takes one"
# What a request may ask of DeRa elsewhere, and would not get.
REFUSED = {
    "principle": _PROMPTS,
    "reference_system": _PROMPTS,
    "combine": "the rules at a token need both branches' logits, and in vLLM their hidden states are mixed",
    "lambda_schedule": "λ is one number for a whole request in vLLM",
}
ALIKE = (LAMBDA, "lam", "λ")  # names that are mistaken for λ's
NOTHING = (None, LINEAR, "", {})  # asks for nothing beside λ


@dataclass(frozen=True)
class Branches:
    """
    A model's adapters and branches, as JSON in vLLM's `additional_config`, which reaches all of its processes.

    Attributes:
        base: folder or hub id.
        adapters, branches, lam: see `Record`.
        lambda_range: the least and the greatest λ of a request; None for any.
        base_arguments: where on the hub the base is, for its config.
        fingerprints: of the adapters' weights: what vLLM has compiled for others is not used.
        served: served name -> aligned branch, see `ModelNames`; empty where clients name the model as vLLM has it.
    """

    base: str
    adapters: Mapping[str, str]
    branches: Mapping[str, Sequence[str]]
    lam: float | Mapping[str, float] = 1.0
    lambda_range: Sequence[float] | None = None
    base_arguments: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)
    served: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_record(
        cls,
        record: Record,
        lambda_range: Sequence[float] | None,
        base_arguments: Mapping[str, Any],
        served: Mapping[str, str] = {},
    ) -> "Branches":
        """
        Raises:
            DeRaError: the record is of a base alone, or of a mixture of weights.
        """
        if not record.branches_differ:
            raise DeRaError(f"base={record.base!r} is a base alone, without λ: name an adapter, or run vllm serve.")
        if record.mixing != LOGITS:
            raise DeRaError(
                f"the model mixes {record.mixing!r}, and in vLLM logits are mixed: export one adapter for each λ (dera "
                "export), and serve them with vLLM's own --enable-lora."
            )
        return cls(
            _absolute(record.base),
            {name: _absolute(folder) for name, folder in record.adapters.items()},
            {name: list(adapters) for name, adapters in record.branches.items()},
            record.lam,
            None if lambda_range is None else list(lambda_range),
            dict(base_arguments),
            {name: weights_fingerprint(folder) for name, folder in record.adapters.items()},
            dict(served),
        )

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Branches":
        """From the configuration of one of vLLM's processes, after `configure` was at it."""
        return cls(**vllm_config.additional_config[KEY])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def record(self) -> Record:
        return Record(self.base, dict(self.adapters), {name: list(each) for name, each in self.branches.items()})

    @property
    def all(self) -> list[Branch]:
        """The reference comes first."""
        return [Branch(name, tuple(adapters)) for name, adapters in self.branches.items()]

    def read(self, extra_args: Mapping[str, Any] | None) -> list[float]:
        """
        λ of each aligned branch, of a request's `extra_args`: `{"lambda": 0.5}`, or of several adapters
        `{"lambda": "helpful=0.7,harmless=0.3"}` (from Python a mapping, too). Without it the model's own.

        Raises:
            DeRaError: it is not a finite number in the range, or names another adapter.
        """
        given = dict(extra_args or {})
        check_names(given)
        lam = given.get(LAMBDA)
        lam = self.lam if lam is None else lam
        if isinstance(lam, str) and "=" in lam:
            lam = read_lambda([lam], LAMBDA)
        for value in lam.values() if isinstance(lam, Mapping) else [lam]:
            self._check(value)
        (point,) = for_adapters([lam], self.record.aligned, LAMBDA)
        return list(point.values()) if isinstance(point, NamedLambda) else [float(point)]

    def _check(self, value: Any) -> None:
        if not is_lambda(value):
            raise DeRaError(f"{LAMBDA} must be a finite number; got {value!r}.")
        if self.lambda_range is not None:
            low, high = self.lambda_range
            if not low <= value <= high:
                raise DeRaError(f"{LAMBDA}={value:g} is out of range; this server takes {low:g} to {high:g}.")


def check_names(given: Mapping[str, Any]) -> None:
    """
    Raises `DeRaError` where a request asks by name for what it would not get. Of a mistyped λ, too: vLLM drops what it
    does not know, and the model's own λ would take its place.
    """
    for name, value in given.items():
        if value in NOTHING:
            continue
        if name in REFUSED:
            raise DeRaError(f"{name}={value!r}: {REFUSED[name]}.")
        if name != LAMBDA and get_close_matches(name.lower(), ALIKE, cutoff=0.8):
            raise DeRaError(f"{name}={value!r}: λ of a request is named {LAMBDA!r}.")


def _absolute(name: str) -> str:
    """A folder's whole path, for processes that may work in another one; a hub id stays as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name
