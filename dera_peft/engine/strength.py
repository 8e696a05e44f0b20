"""λ and the rules of a batch, as a caller may give them."""

from collections.abc import Sequence
from typing import Any

import torch

from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.plan import BatchPlan, read_lam
from dera_peft.engine.rules import LINEAR, Rules, read_rules
from dera_peft.errors import DeRaError


def read_strength(
    lam: Any, combine: Any, lambda_schedule: Any, batch_size: int, aligned: Sequence[str], mixing: str, default: Any
) -> tuple[torch.Tensor, Rules | None]:
    """
    `[B, K]` λ (see `read_lam`) and the rules of the sequences, None where all is plain λ.

    Args:
        lam: None for `default`, for the first λ of a schedule, and for a rule without λ.

    Raises:
        DeRaError: one of them is not valid, they don't fit each other, or the model has no two branches for a rule.
    """
    rules = read_rules(combine, lambda_schedule, batch_size)
    if rules is None:
        return read_lam(default if lam is None else lam, batch_size, aligned), None
    if mixing == WEIGHTS:
        raise DeRaError(f'{rules.argument} needs the logits of two branches, which mixing="weights" has not.')
    if len(aligned) != 1:
        raise DeRaError(
            f"{rules.argument} is for one aligned branch, and the model has {len(aligned)}: {list(aligned)}."
        )
    values = read_lam(default if lam is None else lam, batch_size, aligned).clone()
    for place, (rule, schedule) in enumerate(zip(rules.each, rules.schedules, strict=True)):
        only = 1.0 if not rule.has_lambda else schedule[0][1] if schedule else None
        if only is None:
            continue
        if lam is not None and values[place] != only:
            why = f"combine={str(rule)!r} knows no λ" if not schedule else "lambda_schedule gives λ"
            raise DeRaError(f"lam={float(values[place]):g}: {why}; leave lam out.")
        values[place] = only
    return values, rules


def check_one_branch(lam: Any, combine: Any, lambda_schedule: Any, every_branch: bool) -> None:
    """Raises `DeRaError` where a model whose branches do not differ is asked for more than one."""
    given = {
        "lam": lam,
        "combine": combine,
        "lambda_schedule": lambda_schedule,
        "output_branches": every_branch or None,
    }
    for name, value in given.items():
        asked = value if isinstance(value, (list, tuple)) else [value]  # one for each sequence
        if any(each is not None and not (isinstance(each, (str, tuple)) and each in (LINEAR, ())) for each in asked):
            raise DeRaError(
                f"{name}={value!r}: this model has no adapter, so that its branches can only differ by their prompts: "
                "give the reference's prompt too, or load the model with an adapter."
            )


def check_rules(plan: BatchPlan, lam: Any, combine: Any, labels: torch.Tensor | None) -> None:
    """
    Refuses what one forward pass can't do by a rule.

    Raises:
        DeRaError: the rule depends on the tokens of a completion, and it is not known where that starts; or a loss is
            to be differentiated through what a rule chooses.
    """
    if combine is not None and lam is plan:
        raise DeRaError(f"combine={combine!r}: the plan has its rule; give combine to plan().")
    if plan.rules is None:
        return
    if plan.rules.state is not None and (labels is not None or lam is not plan):
        raise DeRaError(
            f"{plan.rules.state} depends on the tokens of a completion before it: use generate, or score for the "
            "log-probabilities of a given one."
        )
    if labels is not None and not plan.rules.is_linear and torch.is_grad_enabled():
        raise DeRaError(
            f"{plan.rules.argument} with labels: the gradient through what a rule chooses is not computed; train at "
            "plain λ, or take the loss under torch.no_grad()."
        )
