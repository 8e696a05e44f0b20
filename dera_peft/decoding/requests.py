"""What is decoded, and what comes of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.rules import LINEAR, Schedule, read_rule
from dera_peft.engine.samples import ExactSample
from dera_peft.formatting import short_repr

LAMBDA_DIGITS = 6  # of a token's λ: the last of a float32 depend on the batch's shape


class Detokenizer(Protocol):
    """What makes a text of token ids."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str | list[str]: ...


@dataclass(frozen=True)
class Request:
    """
    One completion to be made.

    Attributes:
        index: of its prompt, from 0.
        lam: λ, of several adapters all of them by name; None for a model without λ, or whose branches do not differ.
        sample: its number among the completions of its prompt, λ and rule, from 0.
        combine: the rule at each token, as `str` of an `engine.rules.Rule` writes it.
        schedule: of λ over the positions of new tokens, from `engine.rules.read_schedule`, whose first λ then is `lam`;
            () where λ stays.
    """

    index: int
    lam: Lambda | None
    sample: int = 0
    combine: str = LINEAR
    schedule: Schedule = ()

    @property
    def rule(self) -> dict[str, Any]:
        """As a row's fields have it."""
        return rule_fields(self.combine, self.schedule)

    @property
    def gives_token_lambda(self) -> bool:
        """Whether a rule or a schedule gives each token a λ of its own."""
        return (self.combine, self.schedule) != (LINEAR, ()) and read_rule(self.combine).has_lambda


def rule_fields(combine: str, schedule: Schedule) -> dict[str, Any]:
    """`combine` and `lambda_schedule` as rows have them: None for "linear", and where λ stays."""
    by_position = {str(position): lam for position, lam in schedule}
    return {"combine": None if combine == LINEAR else combine, "lambda_schedule": by_position or None}


def read_rule_of(combine: str | None, lambda_schedule: Mapping[str, float] | None) -> tuple[str, Schedule]:
    """A request's rule and schedule, of a row's fields."""
    schedule = tuple((int(position), lam) for position, lam in (lambda_schedule or {}).items())
    return LINEAR if combine is None else combine, schedule


@dataclass(frozen=True)
class Completion:
    """
    What a request gave.

    Attributes:
        tokens: the new token ids, with the end token if the model gave one.
        text: their text, without special tokens and without the end token.
        end_token_id: the end token; None where the limit of tokens ended it.
        token_lambda: the λ that the rule or the schedule gave each token; None at plain λ, and of a rule without λ.
        exact: what its particles say of it, where it is a sample of the exact mixture.
    """

    __repr__ = short_repr

    request: Request
    tokens: list[int]
    text: str
    end_token_id: int | None
    token_lambda: list[float] | None = None
    exact: ExactSample | None = None

    @classmethod
    def of_tokens(
        cls,
        request: Request,
        drawn: Sequence[int],
        ends: Collection[int],
        tokenizer: Detokenizer,
        token_lambda: Sequence[float] = (),
        exact: ExactSample | None = None,
    ) -> "Completion":
        """
        Args:
            drawn: the new token ids; what follows an end token is left aside.
            ends: the ids of the tokens that end a completion.
            token_lambda: the λ of each of them, left aside where neither rule nor schedule gives one.
        """
        length = next((place for place, token in enumerate(drawn) if token in ends), len(drawn))
        # an end token need not be a special one, which would be left out
        text = cast("str", tokenizer.decode([*drawn[:length]], skip_special_tokens=True))  # of one sequence one text
        tokens = [*drawn[: length + 1]]
        lambdas = [round(lam, LAMBDA_DIGITS) for lam in token_lambda[: len(tokens)]]
        return cls(
            request,
            tokens,
            text,
            end_token_id=drawn[length] if length < len(drawn) else None,
            token_lambda=lambdas if request.gives_token_lambda else None,
            exact=exact,
        )

    @property
    def finish_reason(self) -> str:
        """As rows have it: "eos" if the model ended it, "length" if the limit of tokens did."""
        return "length" if self.end_token_id is None else "eos"
