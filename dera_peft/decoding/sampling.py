"""How tokens are drawn: the settings of sampling."""

from dataclasses import dataclass
from typing import Any

from dera_peft.errors import DeRaError
from dera_peft.settings import AT_LEAST_1, COUNT, Check, Settings, setting

PANEL = "Sampling"


def particles_setting() -> Any:
    """A field of a dataclass of settings: `int | None`."""
    return setting(
        None,
        "Sample the exact mixture, over whole completions, by sequential Monte Carlo with so many particles, each of "
        "which costs what a completion costs. It needs temperature 1 and nothing truncated or penalised.",
        check=COUNT,
        metavar="N",
        panel=PANEL,
    )


@dataclass(frozen=True)
class Sampling(Settings):
    """
    How tokens are drawn, the same for all requests of a run.

    Raises:
        DeRaError: a value is of another type or out of range.
    """

    max_new_tokens: int = setting(128, "At most so many new tokens.", check=AT_LEAST_1, metavar="N", panel=PANEL)
    temperature: float = setting(
        1.0,
        "Divides the mixed logits. 0 is greedy decoding.",
        check=Check(lambda value: value == 0 or value >= 1e-6, "0 (greedy), or at least 1e-6"),
        metavar="T",
        panel=PANEL,
    )
    top_k: int = setting(
        0,
        "Sample from the k most probable tokens; 0 from all.",
        check=Check(lambda value: value >= 0, "0 (off) or more"),
        metavar="K",
        panel=PANEL,
    )
    top_p: float = setting(
        1.0,
        "Sample from the fewest tokens that hold this probability; 1 from all.",
        check=Check(lambda value: 0 < value <= 1, "in (0, 1]"),
        metavar="P",
        panel=PANEL,
    )
    min_p: float = setting(
        0.0,
        "Drop tokens less probable than this share of the most probable one.",
        check=Check(lambda value: 0 <= value < 1, "in [0, 1)"),
        metavar="P",
        panel=PANEL,
    )
    repetition_penalty: float = setting(
        1.0,
        "Above 1 it discourages repetition, as in transformers.",
        check=Check(lambda value: value > 0, "more than 0"),
        metavar="X",
        panel=PANEL,
    )
    seed: int = setting(
        0,
        "Of all random numbers. They depend neither on the batch nor on λ.",
        check=Check(lambda value: 0 <= value < 1 << 64, "from 0 to 2^64 - 1"),
        metavar="N",
        panel=PANEL,
    )

    def check_exact(self) -> None:
        """Raises `DeRaError` where tokens are not drawn from the mixture as it is, whose weights particles know."""
        as_it_is = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        for name, value in as_it_is.items():
            if (given := getattr(self, name)) != value:
                raise DeRaError(
                    f"{name}={given:g}: the exact mixture is sampled at temperature 1, with nothing truncated or "
                    f"penalised; leave {name} out, or particles."
                )
