"""What a user says of an arm: one way to decode that a sweep compares with plain λ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from dera_peft.decoding.lambdas import lambdas_setting
from dera_peft.engine.names import LOGITS
from dera_peft.engine.rules import LINEAR, Rule, read_rule, read_schedule
from dera_peft.errors import DeRaError
from dera_peft.settings import COUNT, Settings, nearest, setting, setting_of

WAYS = ("combine", "lambda_schedule", "mixing", "adapter", "particles")  # an arm has one of these at least
APART = (("combine", "mixing", "particles"), ("lambda_schedule", "mixing", "particles"), ("lambda_schedule", "lambdas"))


def _read_count(texts: Sequence[str]) -> int | str:
    text = texts[-1]
    return int(text) if text.isdecimal() else text  # which the check refuses


@dataclass(frozen=True, kw_only=True)
class ArmSettings(Settings):
    """
    One item of `arms`.

    Raises:
        DeRaError: a value is of another kind, it names no way to decode, or ways that exclude each other.
    """

    called: ClassVar[str] = "an arm"

    combine: str | None = setting(
        None,
        "The rule at each token, as aad:0.1 or plausible:0.1.",
        metavar="RULE",
        normalize=lambda value: None if value is None else str(read_rule(value)),
    )
    lambda_schedule: Any = setting(
        None,
        "λ by the position of a new token, as {0: 2.0, 20: 1.0}; 0:2.0,20:1.0 on the command line.",
        metavar="POSITION:λ[,…]",
        normalize=lambda value: None if value is None else read_schedule(value),
    )
    mixing: Literal["weights"] | None = setting(
        None, "weights: the adapter's weights are scaled by λ, and no logits are mixed.", metavar="KIND"
    )
    adapter: str | None = setting(None, "Another adapter over the same reference, at λ=1 unless told.", metavar="LORA")
    particles: int | None = setting(
        None,
        "Sample the exact mixture of whole texts with so many particles, at temperature 1.",
        check=COUNT,
        metavar="N",
        parse=_read_count,
    )
    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (), "Its own strengths; those of the sweep unless given.", ""
    )
    name: str | None = setting(None, "What it is called; made of the above unless given.", metavar="NAME")

    def __post_init__(self):
        super().__post_init__()
        if not any(getattr(self, way) is not None for way in WAYS):
            raise DeRaError(f"it says no way to decode: give one of {', '.join(WAYS)}.")
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, ())]
        if self.combine == LINEAR:
            raise DeRaError(
                f"combine={LINEAR!r} is plain λ, which is always there as the arm {LOGITS!r}: leave it out."
            )
        for group in APART:
            if len(both := [name for name in group if name in given]) > 1:
                raise DeRaError(f"{' and '.join(both)} exclude each other: make an arm of each.")
        if not self.rule.has_lambda and (both := [name for name in ("lambdas", "lambda_schedule") if name in given]):
            raise DeRaError(f"combine={self.combine!r} knows no λ: leave {both[0]} out.")

    @property
    def rule(self) -> Rule:
        return Rule() if self.combine is None else read_rule(self.combine)

    @property
    def has_lambda(self) -> bool:
        """Whether it is decoded at several λ: neither a rule without one nor a schedule is."""
        return self.rule.has_lambda and self.lambda_schedule is None

    @property
    def label(self) -> str:
        """Its name, or one that tells how it decodes: "aad:0.1", "weights", "runs/dpo-2", "16 particles"."""
        if self.name is not None:
            return self.name
        parts = [self.adapter, self.mixing, self.combine]
        if self.lambda_schedule is not None:
            parts.append("λ " + ",".join(f"{position}:{lam:g}" for position, lam in self.lambda_schedule))
        if self.particles is not None:
            parts.append(f"{self.particles} particles")
        return ", ".join(part for part in parts if part is not None)


def read_arms(values: Any) -> tuple[ArmSettings, ...]:
    """
    The items of `arms`, mappings or `ArmSettings`.

    Raises:
        DeRaError: one is neither, or is not right; or two have one name.
    """
    if not isinstance(values, (list, tuple)):
        raise DeRaError(f"arms={values!r} must be a list of arms, as [{{combine: 'aad:0.1'}}, {{mixing: weights}}].")
    arms = []
    for number, value in enumerate(values):
        try:
            arms.append(value if isinstance(value, ArmSettings) else _read_arm(value))
        except DeRaError as error:
            raise DeRaError(f"arms[{number}]: {error}") from error
    names = [LOGITS, *(arm.label for arm in arms)]
    for name in names:
        if names.count(name) > 1:
            raise DeRaError(f"arms: {name!r} is the name of two arms; give one of them another name, as name: NAME.")
    return tuple(arms)


def _read_arm(value: Any) -> ArmSettings:
    if not isinstance(value, Mapping):
        raise DeRaError(f"{value!r} is not an arm, which is keys with values, as {{combine: 'aad:0.1'}}.")
    known = [each.name for each in fields(ArmSettings)]
    values = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise DeRaError(f"{key!r} is not a key of {ArmSettings.called}; {nearest(name, known)}")
        values[name] = item
    return ArmSettings(**values)


def parse_arms(texts: Sequence[str]) -> tuple[ArmSettings, ...]:
    """
    `["combine=plausible:0.1,lambdas=2,3"]` -> `(ArmSettings(combine="plausible:0.1", lambdas=(2.0, 3.0)),)`.

    A part between commas that has no "=" belongs to the value before it. Raises as `read_arms`.
    """
    parsers = {each.name: setting_of(each).parse for each in fields(ArmSettings)}
    arms = []
    for text in texts:
        pairs: dict[str, str] = {}
        name = None
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if equals:
                name = key.strip()
                if name in pairs:
                    raise DeRaError(f"--arm {text!r}: {name!r} is there twice.")
                pairs[name] = value
            elif name is None:
                raise DeRaError(f"--arm {text!r} is not of the form key=value,key=value, as combine=aad:0.1.")
            else:
                pairs[name] += f",{part}"
        arms.append({name: parse([value]) if (parse := parsers.get(name)) else value for name, value in pairs.items()})
    return read_arms(arms)
