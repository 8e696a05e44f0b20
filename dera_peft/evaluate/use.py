"""The commands that use a λ."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.chats import text_of
from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.decoding.prompts import Prompt
from dera_peft.decoding.sampling import Sampling
from dera_peft.evaluate.arms import Arm
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.loaded import LoadedModel
from dera_peft.settings import setting_of, user_fields

LONGEST = 200  # characters of a prompt on a command line
EXAMPLE = "Write a short poem about the sea."


def commands(config: SweepConfig, arm: Arm, lam: Lambda, prompts: Sequence[Prompt]) -> dict[str, str]:
    """
    "generate", "export" and "serve" at a plain λ, as they can be pasted; of a model in memory calls in Python.

    Args:
        arm: plain λ's.
        prompts: of the sweep, one of which `dera generate` is given.
    """
    if isinstance(arm.source, LoadedModel):
        value = dict(lam) if isinstance(lam, NamedLambda) else lam
        return {"generate": f"model.generate(**inputs, lam={value!r})", "export": f"model.export({value!r}, 'DIR')"}
    model = _options(ModelSource, arm.source)
    systems = {"--principle": config.principle, "--reference-system": config.reference_system}
    model += [word for option, text in systems.items() if text is not None for word in (option, text)]
    texts = (text_of(prompt.content) for prompt in prompts)
    short = (each for each in texts if isinstance(each, str) and each.isprintable() and len(each) <= LONGEST)
    text = next(short, EXAMPLE)
    sampling = _options(Sampling, config.sampling, without=("seed",))
    chat = ["--chat"] if config.chat else []
    at = ["--lambda", f"{lam:g}"]
    made = {"generate": ["dera", "generate", *model, *at, *sampling, *chat, "--prompt", text]}
    if not config.prompts_differ:
        folder = "DIR"  # of the user's choice, where the adapter is one of the hub
        if os.path.isdir(arm.source.name):
            of = "-".join(f"{value:g}" for value in values_of(lam))
            folder = f"{os.path.normpath(arm.source.name)}-lambda-{of}"
        made["export"] = ["dera", "export", *model, *at, "--output", folder]
        listed = [] if isinstance(lam, NamedLambda) else ["--model-lambdas", f"{lam:g}"]
        made["serve"] = ["dera", "serve", *model, *listed]
    return {name: " ".join(map(shlex.quote, words)) for name, words in made.items()}


def _options(kind: type, values: Any, without: Sequence[str] = ()) -> list[str]:
    """The options of a command for what is not at its default."""
    words = []
    for each in user_fields(kind):
        value = getattr(values, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        about = setting_of(each)
        if value == default or each.name in without or not about.on_command_line:
            continue
        option = about.option or "--" + each.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        items = [f"{name}={item}" for name, item in value.items()] if isinstance(value, Mapping) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        for item in items:
            words += [option, f"{item:g}" if isinstance(item, float) else str(item)]
    return words
