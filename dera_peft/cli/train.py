"""`dera sft`, `preferences`, `dpo` and `distill`: the training programs, whose options are TRL's and their own."""

from collections.abc import Callable, Sequence

import typer

from dera_peft.cli.program import process_group
from dera_peft.quiet import be_quiet

# What follows the command's name, --help too, is for the program's own parser.
PASSED_ON = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    "add_help_option": False,
}


def sft(context: typer.Context) -> None:
    """Fine-tune a base: the model that alignment starts from, and DeRa's reference. By TRL."""
    be_quiet()
    from dera_peft.training import sft

    run(sft.main, context.args)


def preferences(context: typer.Context) -> None:
    """Sample completions from an SFT model, and rank them by a reward into chosen and rejected ones."""
    be_quiet()
    from dera_peft.training import preferences

    run(preferences.main, context.args)


def dpo(context: typer.Context) -> None:
    """Align an SFT model with a LoRA adapter, by TRL's DPO. The reference is the SFT model."""
    be_quiet()
    from dera_peft.training import dpo

    run(dpo.main, context.args)


def distill(context: typer.Context) -> None:
    """Bake DeRa at one λ into a LoRA adapter of its own, by TRL's distillation."""
    be_quiet()
    from dera_peft.training import distill

    run(distill.main, context.args)


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Runs a training program; `torchrun` may have started several of it."""
    with process_group():
        main(arguments)
