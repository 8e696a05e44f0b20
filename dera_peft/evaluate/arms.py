"""The arms of a sweep: the ways to decode that it compares, all over one reference."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from dera_peft.checkpoint.fingerprint import (
    base_fingerprint,
    settings_fingerprint,
    weights_fingerprint,
)
from dera_peft.checkpoint.loading import check
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.engine.names import LOGITS, REFERENCE, WEIGHTS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.loaded import LoadedModel
from dera_peft.model import DeRaModel

GRID_STEPS = 4  # points of the fine grid between two λ of the sweep
MAX_GRID = 81  # points in all

COMMAND, WAY_OUT = "dera sweep", "sweep one of their adapters, or a mixture of them (dera export)."


@dataclass(frozen=True)
class Arm:
    """
    One way to decode that a sweep compares.

    Attributes:
        name: "logits", "weights", or the user's own for a further model.
        source: its base and adapter.
        mixing: "logits" or "weights".
        lambdas: the λ to decode at.
        is_own: whether it is the sweep's adapter, and not a further model's.
        place: the λ that a further model stands for, β of the sweep's adapter over its own; None where one of them is
            not known.
        run: fingerprint of all that decides a completion: weights and sampling, not how many prompts, λ or samples.
    """

    name: str
    source: ModelSource
    mixing: str
    lambdas: tuple[float, ...]
    is_own: bool
    place: float | None
    run: str

    @property
    def record(self) -> Record:
        return self.source.resolve()

    @property
    def adapter(self) -> str:
        """The folder or hub id that the user named."""
        return self.source.name

    @property
    def beta(self) -> float | None:
        return beta_of(self.record)

    def load(self, device_map: Any) -> DeRaModel:
        if isinstance(self.source, LoadedModel):
            return self.source.model
        return DeRaModel.from_source(replace(self.source, device_map=device_map), mixing=self.mixing)


def beta_of(record: Record) -> float | None:
    """β that the adapter was trained with, if its record knows one that β/λ can be said of."""
    beta = record.training.get("beta")
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    return float(beta) if is_number and 0 < beta < math.inf else None


def make_arms(config: SweepConfig, loaded: LoadedModel | None = None) -> list[Arm]:
    """
    The arms that a config names: those of the sweep's adapter, "logits" first, and then the further models.

    Args:
        loaded: in place of what the config names; it is one arm alone.

    Raises:
        DeRaError: there is no such model, it does not fit its base, or it stands over another reference, or it is
            several aligned models; or more is asked of a loaded model than it can be.
    """
    if loaded is not None:
        _check_loaded(config)
    source = config.source if loaded is None else loaded
    record = source.resolve_one(COMMAND, WAY_OUT)
    arms = [
        Arm(mixing, source, mixing, config.lambdas, True, None, _run(config, source, mixing))
        for mixing in sorted(config.mixing)  # logits, weights
    ]
    for name, adapter in config.models.items():
        base = None if Record.is_in(adapter) else record.base
        other = replace(source, base=base, adapter=adapter, adapters=None, subfolder=None)
        found = other.resolve_one(COMMAND, WAY_OUT)
        if reference_of(found) != reference_of(record):
            raise DeRaError(
                f"models: {name!r} ({adapter!r}) stands over another reference than the sweep's adapter, so that its "
                "KL would be from something else: it needs the same base, and the same adapters under it."
            )
        try:
            check(found, other.load_arguments(), config=source.config)  # now, not when the arms before it are decoded
        except DeRaError as error:
            raise DeRaError(f"models: {name!r}: {error}") from error
        beta, its_beta = beta_of(record), beta_of(found)
        place = None if beta is None or its_beta is None else beta / its_beta
        arms.append(Arm(name, other, LOGITS, (1.0,), False, place, _run(config, other, LOGITS)))
    return arms


def _check_loaded(config: SweepConfig) -> None:
    """Raises `DeRaError` where a config names a model, or arms that would need another one, beside a loaded model."""
    for each in fields(ModelSource):
        if (value := getattr(config, each.name)) not in (None, (), {}):
            raise DeRaError(f"{each.name}={value!r}: the model is loaded already; give one of the two.")
    if config.models or WEIGHTS in config.mixing:
        argument = "models" if config.models else f"mixing={list(config.mixing)}"
        raise DeRaError(f"{argument}: a model that is loaded is one arm alone; name base and adapter to have more.")


def _run(config: SweepConfig, source: ModelSource, mixing: str) -> str:
    return settings_fingerprint(
        {**source.fingerprint(), "mixing": mixing, "chat": config.chat, "sampling": asdict(config.sampling)}
    )


def reference_of(record: Record) -> tuple:
    """Which weights the reference is made of: where they are local by their fingerprints, else by name."""
    folders = [record.adapters[name] for name in record.branches[REFERENCE]]
    base = record.base_fingerprint or base_fingerprint(record.base, record.base_revision) or record.base
    return (base, *(weights_fingerprint(folder) or folder for folder in folders))


def fine_grid(lambdas: Sequence[float]) -> list[float]:
    """The λ and points evenly between them, as many as MAX_GRID allows; ascending, never beyond the λ themselves."""
    lambdas = sorted(lambdas)
    intervals = max(1, len(lambdas) - 1)
    between = max(0, min(GRID_STEPS, (MAX_GRID - len(lambdas)) // intervals))
    grid = []
    for low, high in pairwise(lambdas):
        grid += [low, *(round(low + (high - low) * step / (between + 1), 9) for step in range(1, between + 1))]
    return [*grid, lambdas[-1]]
