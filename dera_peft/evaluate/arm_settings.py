"""What a user says of an arm: one way to decode that a sweep compares with plain λ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from dera_peft.decoding.lambdas import lambdas_setting
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.settings import COUNT, Settings, nearest, setting, setting_of

LINEAR = "linear"  # DeRa's own rule, that of the arm "logits"
WAYS = ("combine", "mixing", "adapter", "particles")  # an arm has one of these at least


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
        None, "The rule that joins the branches at each token, as aad:0.1 or plausible:0.1.", metavar="RULE"
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
    lambdas: tuple[float, ...] = lambdas_setting((), "Its own strengths; those of the sweep unless given.", "")
    name: str | None = setting(None, "What it is called; made of the above unless given.", metavar="NAME")

    def __post_init__(self):
        super().__post_init__()
        if not any(getattr(self, way) is not None for way in WAYS):
            raise DeRaError(f"it says no way to decode: give one of {', '.join(WAYS)}.")
        if self.combine == LINEAR and self.adapter is None and self.particles is None:
            raise DeRaError(f"combine={LINEAR!r} is the arm {LOGITS!r}, which is always there; leave it out.")
        given = [name for name in ("combine", "mixing", "particles") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DeRaError(f"{' and '.join(given)} exclude each other: make an arm of each.")

    @property
    def label(self) -> str:
        """Its name, or one that tells how it decodes: "aad:0.1", "weights", "runs/dpo-2", "16 particles"."""
        if self.name is not None:
            return self.name
        particles = None if self.particles is None else f"{self.particles} particles"
        return ", ".join(part for part in (self.adapter, self.mixing, self.combine, particles) if part is not None)


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
