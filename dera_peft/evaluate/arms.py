"""The arms of a sweep: the ways to decode that it compares, all over one reference."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dera_peft.checkpoint.check import check
from dera_peft.checkpoint.fingerprint import (
    base_fingerprint,
    settings_fingerprint,
    weights_fingerprint,
)
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import Lambda, for_adapters
from dera_peft.decoding.requests import Request, rule_fields
from dera_peft.engine.names import LOGITS, REFERENCE, WEIGHTS
from dera_peft.engine.rules import LINEAR, Schedule
from dera_peft.errors import DeRaError
from dera_peft.evaluate.arm_settings import ArmSettings
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.loaded import LoadedModel
from dera_peft.evaluate.points import sweep_lambdas
from dera_peft.evaluate.rows import Key
from dera_peft.model import DeRaModel

COMMAND, WAY_OUT = "an arm's adapter", "name one of their adapters, or a mixture of them (dera export)."


@dataclass(frozen=True)
class Arm:
    """
    One way to decode that a sweep compares.

    Attributes:
        name: "logits" (DeRa's plain λ), or that of its settings.
        source: its base and adapter.
        mixing: "logits" or "weights".
        combine, schedule: the rule at each token, and λ over positions, as in `Request`.
        particles: with which the exact mixture is sampled; None where it is not.
        lambdas: the λ to decode at, of several adapters all of them by name; of a rule that knows no λ, or of a
            schedule, None alone.
        is_own: whether it is of the sweep's adapter, and not of another one.
        place: the λ that another adapter stands for, β of the sweep's adapter over its own; None where one of them is
            not known.
        run: fingerprint of all that decides a completion: weights and sampling, not how many prompts, λ or samples.
        prompts_differ: whether the branches have prompts of their own, of which λ is the strength too.
    """

    name: str
    source: ModelSource
    mixing: str
    combine: str
    schedule: Schedule
    particles: int | None
    lambdas: tuple[Lambda | None, ...]
    is_own: bool
    place: float | None
    run: str
    prompts_differ: bool = False

    @property
    def record(self) -> Record:
        return self.source.resolve()

    @property
    def adapter(self) -> str:
        """The folder or hub id that the user named; of several adapters their names, with the folders."""
        aligned = self.record.aligned
        if len(aligned) == 1:
            return self.source.name
        folders = [self.record.adapters.get(name) for name in aligned]
        return ", ".join(
            name if folder is None else f"{name} ({folder})" for name, folder in zip(aligned, folders, strict=True)
        )

    @property
    def beta(self) -> float | None:
        return None if self.prompts_differ else beta_of(self.record)  # λ stands for no training then

    @property
    def has_rule(self) -> bool:
        """Whether something else than λ alone says what each token is drawn from."""
        return self.combine != LINEAR or bool(self.schedule)

    def shares_model(self, other: "Arm") -> bool:
        """Whether one model that is loaded can decode for both."""
        return (self.source, self.mixing) == (other.source, other.mixing)

    def request(self, key: Key) -> Request:
        lam = self.schedule[0][1] if self.schedule else 1.0 if key.lam is None else key.lam
        return Request(key.index, lam, key.sample, self.combine, self.schedule)

    def key(self, request: Request) -> Key:
        """Of a request that `request` made."""
        return Key(self.name, request.index, None if self.lambdas == (None,) else request.lam, request.sample)

    @property
    def ways(self) -> str:
        """What differs from plain λ, and at which λ, for the report."""
        what = [f"adapter {self.adapter}"] if not self.is_own else []
        what += [f"mixing {self.mixing}"] if self.mixing != LOGITS else []
        what += [f"combine {self.combine}"] if self.combine != LINEAR else []
        what += [f"λ by position {_schedule_text(self.schedule)}"] if self.schedule else []
        what += [f"the exact mixture, {self.particles} particles"] if self.particles is not None else []
        strengths = ", ".join(f"{lam:g}" for lam in self.lambdas if lam is not None)
        return ", ".join(what) + (f"; λ {strengths}" if strengths else "")

    def use(self, lam: Lambda | None) -> str:
        """The command that decodes like that; of a model in memory the call."""
        schedule = _schedule_text(self.schedule)
        if isinstance(self.source, LoadedModel):
            named = {"lam": lam, "combine": self.combine if self.combine != LINEAR else None}
            named |= {"lambda_schedule": schedule or None, "particles": self.particles}
            arguments = ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)
            return f"model.{'generate' if self.particles is None else 'sample_exact'}(**inputs, {arguments})"
        named_adapters = [f"{name}={adapter}" for name, adapter in (self.source.adapters or {}).items()]
        options = {"--base": self.source.base, "--adapter": None if named_adapters else self.source.name}
        options |= {
            "--combine": self.combine if self.combine != LINEAR else None,
            "--lambda-schedule": schedule or None,
        }
        options |= {"--particles": self.particles, "--lambda": None if lam is None else f"{lam:g}"}
        text = " ".join(f"{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None)
        text = "".join(f"--adapters {shlex.quote(each)} " for each in named_adapters) + text
        return f"dera export {text} --output DIR" if self.mixing == WEIGHTS else f"dera generate {text}"

    def load(self, device_map: Any) -> DeRaModel:
        if isinstance(self.source, LoadedModel):
            return self.source.model
        return DeRaModel.from_source(replace(self.source, device_map=device_map), mixing=self.mixing)


def _schedule_text(schedule: Schedule) -> str:
    return ",".join(f"{position}:{lam:g}" for position, lam in schedule)


def by_model(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms in their order, those together that one loaded model can decode for."""
    groups: list[list[Arm]] = []
    for arm in arms:
        group = next((group for group in groups if group[0].shares_model(arm)), None)
        if group is None:
            groups.append([arm])
        else:
            group.append(arm)
    return groups


def beta_of(record: Record) -> float | None:
    """β that the adapter was trained with, if its record knows one that β/λ can be said of."""
    beta = record.training.get("beta")
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    return float(beta) if is_number and 0 < beta < math.inf and len(record.aligned) == 1 else None


def make_arms(config: SweepConfig, loaded: LoadedModel | None = None) -> list[Arm]:
    """
    The arms that a config names: plain λ, "logits", and then the others in their order.

    Args:
        loaded: in place of what the config names. No arm needs another model then.

    Raises:
        DeRaError: there is no such model, it does not fit its base, or it stands over another reference, or it is
            several aligned models; or more is asked of a loaded model than it can be.
    """
    if loaded is not None:
        _check_loaded(config)
    source = config.source if loaded is None else loaded
    config.check_way(prompts_differ=config.prompts_differ)
    config.check_model(source)
    source.check_has_adapter(COMMAND, config.prompts_differ)
    lambdas = sweep_lambdas(source.resolve().aligned, config.lambdas, config.simplex, config.simplex_total)
    run, differ = _run(config, source, LOGITS), config.prompts_differ
    plain = Arm(LOGITS, source, LOGITS, LINEAR, (), None, lambdas, True, None, run, differ)
    return [plain, *(_make_arm(config, plain, number, asked) for number, asked in enumerate(config.arms))]


def _make_arm(config: SweepConfig, plain: Arm, number: int, asked: ArmSettings) -> Arm:
    if config.prompts_differ and (asked.mixing == WEIGHTS or asked.particles is not None):
        way = "mixing" if asked.mixing == WEIGHTS else "particles"
        raise DeRaError(f"arms[{number}]: {way} does not go together with prompts that differ (principle).")
    source, place = plain.source, None
    mixing = asked.mixing or LOGITS
    combine, schedule, particles = str(asked.rule), asked.lambda_schedule or (), asked.particles
    if particles is not None:
        config.sampling.check_exact()
    called = f"arms[{number}]: "
    config.check_way(mixing=mixing, combine=combine, schedule=schedule, particles=particles, called=called)
    if asked.adapter is not None and config.endpoint is not None:
        raise DeRaError(f"{called}adapter={asked.adapter!r} is another model than the one that the endpoint serves.")
    lambdas: tuple[Lambda | None, ...] = plain.lambdas
    if len(plain.record.aligned) > 1 and asked.adapter is None and (combine != LINEAR or schedule or particles):
        what = f"combine={combine!r}" if combine != LINEAR else "lambda_schedule" if schedule else "particles"
        raise DeRaError(f"arms[{number}]: {what} is for one aligned adapter, and the sweep has several.")
    if asked.adapter is not None:
        source = _other_source(plain, asked.adapter, f"arms[{number}]")
        beta, its_beta = plain.beta, beta_of(source.resolve())
        place = None if beta is None or its_beta is None else beta / its_beta
        lambdas = (1.0,)
    if asked.lambdas:
        lambdas = for_adapters(asked.lambdas, source.resolve().aligned, f"arms[{number}], lambdas")
    return Arm(
        asked.label, source, mixing, combine, schedule, particles, lambdas if asked.has_lambda else (None,),
        asked.adapter is None, place, _run(config, source, mixing, combine, schedule, particles),
        config.prompts_differ,
    )  # fmt: skip


def _other_source(plain: Arm, adapter: str, argument: str) -> ModelSource:
    """Another adapter over the same reference, checked as far as can be without loading weights."""
    base = None if Record.is_in(adapter) else plain.record.base
    source = replace(plain.source, base=base, adapter=adapter, adapters=None, subfolder=None)
    record = source.resolve_one(COMMAND, WAY_OUT)
    if reference_of(record) != reference_of(plain.record):
        raise DeRaError(
            f"{argument}: {adapter!r} stands over another reference than the sweep's adapter, so that its KL would be "
            "from something else: it needs the same base, and the same adapters under it."
        )
    try:
        check(record, source.load_arguments(), config=plain.source.config)  # now, not when the arms before are decoded
    except DeRaError as error:
        raise DeRaError(f"{argument}: {error}") from error
    return source


def _check_loaded(config: SweepConfig) -> None:
    """Raises `DeRaError` where a config names a model, or an arm that would need another one, beside a loaded model."""
    if not config.is_local:
        raise DeRaError(f"{config.decoder_name}: the model is loaded already, and decodes; give one of the two.")
    for each in fields(ModelSource):
        if (value := getattr(config, each.name)) not in (None, (), {}):
            raise DeRaError(f"{each.name}={value!r}: the model is loaded already; give one of the two.")
    for number, arm in enumerate(config.arms):
        for name in ("adapter", "mixing"):
            if (value := getattr(arm, name)) is not None:
                raise DeRaError(
                    f"arms[{number}]: {name}={value!r} needs another model than the one that is loaded; name base and "
                    "adapter in its place."
                )


def _run(
    config: SweepConfig,
    source: ModelSource,
    mixing: str,
    combine: str = LINEAR,
    schedule: Schedule = (),
    particles: int | None = None,
) -> str:
    further = {name: value for name, value in rule_fields(combine, schedule).items() if value is not None}
    further |= {} if particles is None else {"particles": particles}
    return settings_fingerprint(
        {
            **source.fingerprint(),
            "mixing": mixing,
            "chat": config.chat,
            "sampling": asdict(config.sampling),
            **config.system_prompts(),
            **config.fingerprint_of_engine(config.sampling),
            **further,
        }
    )


def reference_of(record: Record) -> tuple:
    """Which weights the reference is made of: where they are local by their fingerprints, else by name."""
    folders = [record.adapters[name] for name in record.branches[REFERENCE]]
    base = record.base_fingerprint or base_fingerprint(record.base, record.base_revision) or record.base
    return (base, *(weights_fingerprint(folder) or folder for folder in folders))
