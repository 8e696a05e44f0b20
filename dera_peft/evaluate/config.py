"""The settings of a sweep."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.batch_size import batch_size_setting
from dera_peft.decoding.lambdas import LAMBDAS, is_lambda, lambdas_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.system_settings import SystemSettings
from dera_peft.errors import DeRaError
from dera_peft.evaluate.arm_settings import ArmSettings, parse_arms, read_arms
from dera_peft.files import check_exists, check_file
from dera_peft.remote.settings import RemoteSettings
from dera_peft.settings import COUNT, Check, part, plain, setting, setting_like

RADIUS = 1.0  # nats
STANDARD_ERRORS = 1.0  # Breiman et al., Classification and Regression Trees (1984): the one-standard-error rule
MAX_PERPLEXITY = 1.25  # times that of the text at λ=0 or 1, the higher one
MAX_REPETITION = 0.05  # more than there, as a share of 4-grams
PROMPTS, SAMPLING, MEASURING, CHOOSING = "Prompts", "Sampling", "Measuring", "Choosing"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SystemSettings, Sampling, RemoteSettings, ModelSource):
    """
    The keys of `sweep.yaml`, and the arguments of `dera_peft.evaluate.sweep`.

    Raises:
        DeRaError: a value is of another kind or out of range; the message names its key.
    """

    called: ClassVar[str] = "a sweep"

    prompts: Any = setting(
        help="Held-out prompts: .txt (one a line), .jsonl or .csv (rows), path.py:function, or a dataset (hub id or "
        "folder). In Python also a list of texts, chats or rows, or a `datasets.Dataset`.",
        metavar="SOURCE",
        panel=PROMPTS,
    )
    split: str = setting("train", "Split of a dataset.", metavar="SPLIT", panel=PROMPTS)
    subset: str | None = setting(
        None, "Subset (configuration) of a hub dataset that has several.", metavar="SUBSET", panel=PROMPTS
    )
    prompt_column: str = setting(
        "prompt",
        "The column with the prompts, texts or chats. One that is not called prompt may hold whole chats, of which the "
        "prompt is what stands before the last answer. Rewards are given the other columns.",
        metavar="COLUMN",
        panel=PROMPTS,
    )
    max_prompts: int | None = setting(None, "Use the first so many.", check=COUNT, metavar="N", panel=PROMPTS)
    chat: bool = setting_like(PromptSettings, "chat")
    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (),
        "Strengths to decode at; 0,0.25,0.5,0.75,1,1.5,2 unless given. Of several adapters a point is name=λ,name=λ, "
        "and in a file a list for each adapter is for all combinations; the reference and --simplex 4 unless given.",
        SAMPLING,
    )
    simplex: int | None = setting(
        None,
        "Of several adapters: all λ ≥ 0 that sum to --simplex-total, in so many steps; beside the lambdas that are "
        "given, or else the reference.",
        check=COUNT,
        metavar="STEPS",
        panel=SAMPLING,
    )
    simplex_total: float = setting(
        1.0,
        "What the λ of the simplex sum to.",
        check=Check(lambda value: value > 0 and is_lambda(value), "more than 0"),
        metavar="λ",
        panel=SAMPLING,
    )
    samples: int = setting(4, "Completions per prompt and λ.", check=COUNT, metavar="N", panel=SAMPLING)
    arms: tuple[ArmSettings, ...] = setting(
        (),
        "Further ways to decode, each an arm beside plain λ: combine=RULE (a rule at each token), mixing=weights (the "
        "adapter scaled by λ), adapter=LORA (another one over the same reference), particles=N (the exact mixture); "
        "with lambdas and name of its own. In a file a list of mappings. Can be repeated.",
        metavar="KEY=VALUE[,…]",
        panel=SAMPLING,
        option="--arm",
        parse=parse_arms,
    )
    batch_size: int | None = batch_size_setting(SAMPLING)
    rewards: tuple[str | Callable, ...] = setting(
        (),
        "What scores completions; can be repeated, and λ is chosen by the first one. path.py:name of "
        "f(prompts, completions, **columns) -> list[float], as in TRL; a sequence-classification model with one label "
        "(hub id or folder); or length, implicit (what the adapter itself rewards), perplexity (under the reference), "
        "repetition, distinct-1 (2, 3 …), exact_match:COLUMN.",
        metavar="REWARD",
        panel=MEASURING,
        option="--reward",
    )
    judge: str | Callable | None = setting(
        None,
        "Compares completions with those at λ=0 and λ=1, for win rates: path.py:name of f(prompts, pairs) -> list of 0 "
        "(the first is better), 1 or -1 (neither); or a sequence-classification model.",
        metavar="JUDGE",
        panel=MEASURING,
    )
    group: str | None = setting(
        None, "A column of the prompts: results for each of its values.", metavar="COLUMN", panel=MEASURING
    )
    choose_by: str | None = setting(
        None,
        "The name of the reward that λ is chosen by; the first one, which the adapter was trained for, unless given.",
        metavar="NAME",
        panel=CHOOSING,
    )
    gold: str | None = setting(
        None,
        "The name of a reward that was not trained for: it is told from which λ the first one still rises while this "
        "one falls. λ is chosen by it only with --choose-by.",
        metavar="NAME",
        panel=CHOOSING,
    )
    rule: Literal["reward", "kl_budget", "worst_group", "robust"] = setting(
        "reward",
        "Which λ is best: reward (the highest mean), kl_budget (the highest mean within --kl-budget), worst_group (the "
        "highest mean of the worst group), robust (the highest mean under the worst reweighting of the prompts within "
        "--radius). Recommended is the smallest that can't be told from it, see --standard-errors.",
        metavar="RULE",
        panel=CHOOSING,
    )
    standard_errors: float = setting(
        STANDARD_ERRORS,
        "The smallest λ is recommended whose paired difference to the best is within so many standard errors; 0 for "
        "the best itself.",
        check=Check(lambda value: 0 <= value < math.inf, "a number, 0 or more", names_type=True),
        metavar="N",
        panel=CHOOSING,
    )
    max_perplexity: float = setting(
        MAX_PERPLEXITY,
        "A guard: λ whose text has a perplexity under the reference of more than so many times that at λ=0 or 1, the "
        "higher one, is passed over; inf for no such guard.",
        check=Check(lambda value: value >= 1, "1 or more"),
        metavar="FACTOR",
        panel=CHOOSING,
    )
    max_repetition: float = setting(
        MAX_REPETITION,
        "A guard: λ whose texts repeat a share of their 4-grams that is by more than this above that at λ=0 or 1, the "
        "higher one, is passed over; inf for no such guard.",
        check=Check(lambda value: value >= 0, "0 or more"),
        metavar="SHARE",
        panel=CHOOSING,
    )
    kl_budget: float | None = setting(
        None,
        "KL to the reference, a completion, at most.",
        check=Check(lambda value: value >= 0, "a number of nats, 0 or more", names_type=True),
        metavar="NATS",
        panel=CHOOSING,
    )
    radius: float | None = setting(
        None,
        f"Of the rule robust: how far the prompts are reweighted, as a KL, at most; {RADIUS:g} unless given, which "
        "covers every part of 37 % of the prompts or more (a part of the share s is covered from -log s on).",
        check=Check(lambda value: value >= 0, "a number of nats, 0 or more", names_type=True),
        metavar="NATS",
        panel=CHOOSING,
    )
    curve: bool = setting(
        True,
        "Estimate reward and KL between the λ too. Each completion is scored at up to 81 λ for it, which on a CPU can "
        "take longer than to decode it.",
        panel=MEASURING,
    )
    output_dir: str | None = setting(
        None,
        "For report.html, the plots, summary.csv and samples.jsonl; and what is made on the way, in parts/.",
        metavar="DIR",
        panel="Output",
    )

    def __post_init__(self):
        object.__setattr__(self, "prompts", _plain_prompts(self.prompts))
        lambdas = plain(self.lambdas)
        is_list = isinstance(lambdas, (list, tuple, range))
        is_given = lambdas or lambdas == ()  # an empty tuple is the default
        if not isinstance(lambdas, Mapping) and not (is_list and is_given and LAMBDAS.holds(list(map(plain, lambdas)))):
            raise DeRaError(f"lambdas={lambdas!r} must be a list of {LAMBDAS.wanted}.")
        object.__setattr__(self, "lambdas", lambdas)
        object.__setattr__(self, "arms", read_arms(self.arms))
        super().__post_init__()
        if twice := next((value for value in self.rewards if self.rewards.count(value) > 1), None):
            raise DeRaError(f"rewards: {twice!r} is there twice.")
        if self.simplex is None and self.simplex_total != 1:
            raise DeRaError(f"simplex_total={self.simplex_total:g} has no effect without a simplex: set simplex.")
        if self.rule == "kl_budget" and self.kl_budget is None:
            raise DeRaError("rule='kl_budget' needs the budget: set kl_budget, a number of nats.")
        if self.rule != "kl_budget" and self.kl_budget is not None:
            raise DeRaError(
                f"kl_budget={self.kl_budget:g} has no effect on rule={self.rule!r}: set rule='kl_budget', or leave it "
                "out."
            )
        if self.rule != "robust" and self.radius is not None:
            raise DeRaError(
                f"radius={self.radius:g} has no effect on rule={self.rule!r}: set rule='robust', or leave it out."
            )
        if self.rule == "worst_group" and self.group is None:
            raise DeRaError("rule='worst_group' needs the column that tells the groups: set group.")
        self.check_sampling(self.sampling)
        if "quantization" in self.vllm_arguments:
            raise DeRaError(
                "vllm_arguments: 'quantization' would be of the model that decodes alone, and a sweep scores with the "
                "model of this process: give quantization, which is of both."
            )

    def check_paths(self) -> None:
        super().check_paths()
        for number, arm in enumerate(self.arms):
            if arm.adapter is not None:
                check_exists(f"arms[{number}], adapter", arm.adapter)
        named = {"prompts": (self.prompts,), "rewards": self.rewards, "judge": (self.judge,)}
        for argument, values in named.items():
            for value in values:
                if isinstance(value, str):
                    check_file(argument, value)

    @property
    def sampling(self) -> Sampling:
        return part(self, Sampling)

    @property
    def source(self) -> ModelSource:
        return part(self, ModelSource)

    @property
    def effective_radius(self) -> float | None:
        """That of the rule "robust"; None by another rule."""
        return (RADIUS if self.radius is None else self.radius) if self.rule == "robust" else None

    @classmethod
    def merge(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """A rule takes the place of the file's rule with what belongs to that: a budget, a radius."""
        for name, of in (("kl_budget", "kl_budget"), ("radius", "robust")):
            if given.get("rule") not in (None, of) and name not in given:
                values = {key: value for key, value in values.items() if key != name}
        return super().merge(values, given)


def _plain_prompts(prompts: Any) -> str | Sequence:
    """
    What names prompts as a text; a list, or a `datasets.Dataset`, which is a list of rows.

    Raises:
        DeRaError: it is neither, or empty.
    """
    prompts = os.fspath(prompts) if isinstance(prompts, os.PathLike) else plain(prompts)
    # a Dataset is no Sequence by its type; datasets takes a second to import, and a user who has one has done so
    datasets = sys.modules.get("datasets")
    is_dataset = datasets is not None and isinstance(prompts, datasets.Dataset)
    if not (is_dataset or isinstance(prompts, (str, list, tuple))) or not len(prompts):
        wanted = "must name a file, a function or a dataset, or be a list or a datasets.Dataset"
        got = repr(prompts) if isinstance(prompts, (str, list, tuple)) or prompts is None else type(prompts).__name__
        raise DeRaError(f"prompts={got} {wanted}, and not be empty.")
    return prompts
