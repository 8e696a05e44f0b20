"""What a sweep runs: its settings, from a YAML file, a command line or Python."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from dera_peft.checkpoint.record import LOGITS, WEIGHTS
from dera_peft.decoding.prompts import is_lambda
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.recommend import RULES

TEXTS = ("split", "prompt_column")
TEXTS_OR_NONE = ("output_dir", "base", "adapter", "quantization", "dtype", "device_map", "subset", "group")
COUNTS = ("samples", "batch_size")
OF_SAMPLING = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class SweepConfig:
    """
    The keys of `sweep.yaml`, and the arguments of `dera_peft.evaluate.sweep`.

    Attributes:
        prompts: a .txt, .jsonl or .csv file, a function as path.py:name, a dataset by hub id or folder; in Python also
            a list of prompts (texts, chats, or rows with a "prompt" and further columns).
        rewards: what scores completions (see `rewards.load_rewards`); λ is recommended by the first one.
        output_dir: where all files go.
        base, adapter, quantization, dtype, device_map: as in `DeRaModel.from_pretrained`.
        mixing: "logits", or with "weights" beside it the adapter's weights scaled by λ, as a line to compare with.
        models: further lines: name -> adapter over the same reference, decoded as trained.
        lambdas: the λ to decode at.
        samples: completions per prompt and λ.
        split, subset: of a dataset.
        prompt_column: what holds the prompts; further columns are given to the rewards.
        max_prompts: use the first so many prompts; None for all.
        chat: render the prompts with the tokenizer's chat template.
        judge: compares each completion with those at λ=0 and λ=1 (see `judges.load_judge`); None for none.
        group: the column whose values are summarised apart.
        rule: how λ is recommended: "reward" (highest mean), "lower_bound" (highest lower end of its interval),
            "kl_budget" (highest mean where the KL is at most `kl_budget`), "worst_group" (highest mean of the group
            that fares worst).
        kl_budget: nats per completion.
        batch_size: completions decoded at once, at most.
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.

    Raises:
        DeRaError: a value is of another kind or out of range; the message names its key.
    """

    prompts: str | Sequence[Any]
    rewards: str | Sequence[str | Callable] = ()
    output_dir: str | None = None
    base: str | None = None
    adapter: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    mixing: str | Sequence[str] = (LOGITS,)
    models: Mapping[str, str] = field(default_factory=dict)
    lambdas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    samples: int = 4
    split: str = "train"
    subset: str | None = None
    prompt_column: str = "prompt"
    max_prompts: int | None = None
    chat: bool = False
    judge: str | Callable | None = None
    group: str | None = None
    rule: str = "reward"
    kl_budget: float | None = None
    batch_size: int = 32
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        self.sampling  # noqa: B018 (checks itself)
        for name in (*TEXTS, *TEXTS_OR_NONE, *COUNTS, "max_prompts", "chat"):
            self._check_plain(name)
        if not isinstance(self.prompts, (str, list, tuple)) or not self.prompts:
            raise DeRaError(f"prompts={self.prompts!r} must name a file, a function or a dataset, or be a list.")
        if not (self.judge is None or isinstance(self.judge, str) or callable(self.judge)):
            raise DeRaError(f"judge={self.judge!r} must be a text, a function, or left out.")
        object.__setattr__(
            self, "rewards", self._list("rewards", lambda value: isinstance(value, str) or callable(value))
        )
        object.__setattr__(self, "mixing", self._list("mixing", lambda value: value in (LOGITS, WEIGHTS)))
        if LOGITS not in self.mixing:
            raise DeRaError(
                f"mixing={list(self.mixing)!r} must contain {LOGITS!r}: it is what the others stand beside."
            )
        if not isinstance(self.models, Mapping) or not all(
            isinstance(text, str) and text for pair in self.models.items() for text in pair
        ):
            raise DeRaError(f"models={self.models!r} must map names to adapters, as {{retrained: runs/dpo-2}}.")
        if taken := [name for name in self.models if name in (LOGITS, WEIGHTS)]:
            raise DeRaError(f"models: {taken[0]!r} is the name of another line; choose another one.")
        if not isinstance(self.lambdas, (list, tuple)) or not self.lambdas or not all(map(is_lambda, self.lambdas)):
            raise DeRaError(f"lambdas={self.lambdas!r} must be a list of finite numbers, as [0, 0.5, 1].")
        # -0.0 is 0.0
        object.__setattr__(self, "lambdas", tuple(dict.fromkeys(float(lam) + 0.0 for lam in self.lambdas)))
        self._check_rule()

    def _check_plain(self, name: str) -> None:
        value = getattr(self, name)
        if name == "chat":
            holds, wanted = isinstance(value, bool), "true or false"
        elif name in (*TEXTS, *TEXTS_OR_NONE):
            holds, wanted = isinstance(value, str) and value != "", "a text"
        else:
            holds, wanted = type(value) is int and value >= 1, "an integer of at least 1"
        if name in (*TEXTS_OR_NONE, "max_prompts"):
            holds, wanted = holds or value is None, f"{wanted}, or left out"
        if not holds:
            raise DeRaError(f"{name}={value!r} must be {wanted}.")

    def _list(self, name: str, fits: Callable[[Any], bool]) -> tuple:
        """A key that may be one value or a list of them."""
        value = getattr(self, name)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(map(fits, values)):
            wrong = next(value for value in values if not fits(value))
            raise DeRaError(f"{name}: {wrong!r} is not one of what it may hold; see dera sweep --help.")
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise DeRaError(f"{name}: {twice!r} is there twice.")
        return values

    def _check_rule(self) -> None:
        if self.rule not in RULES:
            raise DeRaError(f"rule={self.rule!r} is not known; choose one of {', '.join(RULES)}.")
        budget = self.kl_budget
        if budget is not None:
            is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
            if not is_number or not 0 <= budget < math.inf:
                raise DeRaError(f"kl_budget={budget!r} must be a number of nats, 0 or more.")
        if (self.rule == "kl_budget") != (budget is not None):
            raise DeRaError(f"rule={self.rule!r}, kl_budget={budget!r}: a budget goes with the rule kl_budget alone.")
        if self.rule == "worst_group" and self.group is None:
            raise DeRaError("rule='worst_group' needs the column that tells the groups: set group.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in OF_SAMPLING})

    @classmethod
    def read(cls, file: str | None, **overrides) -> "SweepConfig":
        """
        From a YAML file, with `overrides` (those that are not None) before it.

        Raises:
            DeRaError: no such file, not a mapping, an unknown key, or a key missing.
        """
        values = {}
        if file is not None:
            try:
                values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
            except FileNotFoundError:
                raise DeRaError(f"config={file!r}: there is no such file.") from None
            except yaml.YAMLError as error:
                raise DeRaError(f"config={file!r} is not valid YAML: {error}") from None
            if not isinstance(values, dict):
                raise DeRaError(f"config={file!r} must hold keys with values.")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                close = get_close_matches(str(key), known, n=1)
                hint = f"do you mean {close[0]!r}?" if close else f"there are {known}."
                raise DeRaError(f"config={file!r}: {key!r} is not a key of a sweep; {hint}")
        values.update({key: value for key, value in overrides.items() if value is not None})
        # a rule that knows no budget takes the place of the file's rule with its budget
        if overrides.get("rule") not in (None, "kl_budget") and overrides.get("kl_budget") is None:
            values.pop("kl_budget", None)
        if "prompts" not in values:
            raise DeRaError("prompts is missing: set it in the config or with --prompts.")
        return cls(**values)
