"""The rule at a token and the schedule of λ as settings, and the λ of the requests under them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.rules import FORMS, LINEAR, Rule, Schedule, read_rule, read_schedule
from dera_peft.errors import DeRaError
from dera_peft.settings import Check, Settings, setting

POSITIONS = Check(lambda value: True, "λ by position, as {0: 2.0, 20: 1.0}", names_type=True)


def _read_texts(texts: Sequence[str]) -> dict[int, float]:
    return dict(read_schedule(",".join(texts)))


@dataclass(frozen=True)
class RuleSettings(Settings):
    """How the logits of the reference and the aligned model become one at each token."""

    combine: str = setting(
        LINEAR,
        f"The rule at each token: {FORMS}. Where λ is above 1 and tokens are sampled, plausible:0.1 keeps text from "
        "breaking.",
        metavar="RULE",
        panel="Sampling",
        normalize=lambda text: str(read_rule(text)),
    )
    lambda_schedule: dict[int, float] | None = setting(
        None,
        "In the place of --lambda: λ by the position of a new token, as 0:2.0,20:1.0.",
        check=POSITIONS,
        metavar="N:λ[,N:λ…]",
        panel="Sampling",
        parse=_read_texts,
        normalize=lambda value: None if value is None else dict(read_schedule(value)),
    )

    @property
    def rule(self) -> Rule:
        return read_rule(self.combine)

    @property
    def schedule(self) -> Schedule:
        return () if self.lambda_schedule is None else read_schedule(self.lambda_schedule)

    @property
    def asked(self) -> str | None:
        """What is not plain λ, for messages."""
        if self.lambda_schedule is not None:
            return "--lambda-schedule"
        return None if self.rule.name == LINEAR else f"--combine {self.combine}"

    def lambdas_of(
        self, given: Sequence[Lambda], default: Sequence[Lambda], aligned: Sequence[str], argument: str = "--lambda"
    ) -> tuple[Lambda, ...]:
        """
        The λ of the requests: those that were given, else the default; the first one of a schedule; and 1 for a rule
        without λ.

        Args:
            aligned: the names of the model's aligned branches.
            argument: where λ were given, for messages.

        Raises:
            DeRaError: λ are given where there are none, or a rule to a model of several adapters.
        """
        if self.asked is None:
            return tuple(given or default)
        if len(aligned) != 1:
            raise DeRaError(f"{self.asked} is for one aligned adapter, and this model has {list(aligned)}.")
        if self.schedule and not self.rule.has_lambda:
            raise DeRaError(f"--combine {self.combine} knows no λ: leave --lambda-schedule out.")
        if self.schedule:
            if given:
                raise DeRaError(f"{argument}: --lambda-schedule gives λ; leave one of them out.")
            return (self.schedule[0][1],)
        if not self.rule.has_lambda:
            if other := [lam for lam in given if lam != 1]:
                raise DeRaError(f"{argument}: {other[0]:g}, and --combine {self.combine} knows no λ; leave it out.")
            return (1.0,)
        return tuple(given or default)
