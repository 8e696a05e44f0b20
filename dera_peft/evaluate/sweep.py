"""A sweep over λ: decode held-out prompts, score them, and say what each λ gives."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from dera_peft.decoding import Completion, Request, decode
from dera_peft.errors import DeRaError
from dera_peft.evaluate.kl import token_kl
from dera_peft.evaluate.plot import plot_sweep
from dera_peft.evaluate.rewards import Reward, load_reward, reward_fingerprint, score_batch
from dera_peft.evaluate.summary import LambdaSummary, summarise, write_csv
from dera_peft.fingerprint import model_fingerprint, settings_fingerprint
from dera_peft.loading import load, load_config, load_tokenizer, resolve
from dera_peft.model import DeRaModel
from dera_peft.prompts import Prompt, column_names, encode, from_file, is_lambda
from dera_peft.results import Results
from dera_peft.sampling import Sampling

# What a key's value must be, by the type of its field; a sampling's own are checked by `Sampling`.
KINDS = {
    str: "a text",
    str | None: "a text, or left out",
    int: "an integer of at least 1",
    int | None: "an integer of at least 1, or left out",
    bool: "true or false",
}


@dataclass(frozen=True)
class SweepConfig:
    """
    What a sweep runs; the keys of `sweep.yaml`.

    Attributes:
        prompts: a .txt or .jsonl file, or a function as path.py:name.
        reward: a function `f(prompts, completions, **columns) -> list[float]`, as path.py:name; or a
            sequence-classification model with one label, by hub id or folder.
        output_dir: where samples.jsonl, summary.csv and sweep.png go.
        base, adapter, quantization, dtype, device_map: as in `DeRaModel.from_pretrained`.
        lambdas: the λ to decode at.
        samples: completions per prompt and λ.
        max_prompts: use the first so many prompts; None for all.
        chat: render the prompts with the tokenizer's chat template.
        batch_size: completions decoded at once.
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
    """

    prompts: str
    reward: str
    output_dir: str
    base: str | None = None
    adapter: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    lambdas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    samples: int = 4
    max_prompts: int | None = None
    chat: bool = False
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
        of_sampling = {field.name for field in fields(Sampling)}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type not in KINDS or field.name in of_sampling:
                continue
            holds = isinstance(value, field.type) and isinstance(value, bool) == (field.type is bool)
            if not holds or (type(value) is int and value < 1):
                raise DeRaError(f"{field.name}={value!r} must be {KINDS[field.type]}.")
        if not isinstance(self.lambdas, (list, tuple)) or not self.lambdas or not all(map(is_lambda, self.lambdas)):
            raise DeRaError(f"lambdas={self.lambdas!r} must be a list of finite numbers, as [0, 0.5, 1].")
        # -0.0 is 0.0
        object.__setattr__(self, "lambdas", tuple(dict.fromkeys(float(lam) + 0.0 for lam in self.lambdas)))

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

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
        if unknown := [key for key in values if key not in known]:
            raise DeRaError(f"config={file!r}: {unknown[0]!r} is not a key of a sweep; there are {known}.")
        values.update({key: value for key, value in overrides.items() if value is not None})
        for key in ("prompts", "reward", "output_dir"):
            if key not in values:
                raise DeRaError(f"{key} is missing: set it in the config or with --{key.replace('_', '-')}.")
        return cls(**values)


@dataclass(frozen=True)
class SweepResult:
    """The summaries by ascending λ, the rows of samples.jsonl, and how many of them an earlier run had made."""

    summaries: list[LambdaSummary]
    samples: list[dict]
    reused: int


def sweep(
    config: SweepConfig,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SweepResult:
    """
    Decodes, scores and summarises; writes samples.jsonl, summary.csv and sweep.png into `config.output_dir`.

    Rows are written as they are finished. Run again with the same settings, it continues where it stopped and draws
    the same random numbers.

    Args:
        on_start: told (completions in all, those that are there already) before decoding.
        on_progress: told how many more are finished.

    Raises:
        DeRaError: bad input; a reward that fails. What was finished before stays on disk.
    """
    reward = load_reward(config.reward)
    prompts = from_file(config.prompts)[: config.max_prompts]
    if own := sum(prompt.lam is not None for prompt in prompts):
        print(
            f"{config.prompts}: {own} of {len(prompts)} prompts have a lambda of their own, which a sweep leaves "
            "aside: it decodes each at all of its lambdas",
            file=sys.stderr,
        )
    results = Results(Path(config.output_dir) / "samples.jsonl", _fingerprint(config))
    requests = [
        Request(prompt.index, lam, sample)
        for prompt in prompts
        for lam in config.lambdas
        for sample in range(config.samples)
    ]
    finished = results.finished(prompts)
    todo = [request for request in requests if request not in finished]
    reused = len(requests) - len(todo)
    if on_start:
        on_start(len(requests), reused)
    if todo:
        tokenizer = load_tokenizer(config.base, config.adapter)
        record = resolve(config.base, config.adapter)
        base_config = load_config(record.base, revision=record.base_revision)
        tokens = encode(prompts, tokenizer, base_config, config.max_new_tokens, config.chat)
        model = load(
            config.base,
            config.adapter,
            quantization=config.quantization,
            dtype=config.dtype,
            device_map=config.device_map,
        )
        names = column_names(prompts)
        for completions in decode(model, tokenizer, tokens, todo, config.sampling, config.batch_size):
            results.append(_measure(model, prompts, tokens, completions, reward, names))
            if on_progress:
                on_progress(len(completions))
    finished = results.finished(prompts)
    samples = [finished[request] for request in requests]
    summaries = summarise(samples)
    write_csv(summaries, Path(config.output_dir) / "summary.csv")
    title = f"{len(prompts)} prompts, {config.samples} samples each; bars: standard error over prompts"
    plot_sweep(summaries, Path(config.output_dir) / "sweep.png", title)
    return SweepResult(summaries, samples, reused)


def _fingerprint(config: SweepConfig) -> str:
    """Of all that decides a row: weights, sampling and reward; not of how many prompts, λ or samples there are."""
    return settings_fingerprint(
        {
            **model_fingerprint(resolve(config.base, config.adapter)),
            "quantization": config.quantization,
            "dtype": config.dtype,
            "chat": config.chat,
            "sampling": asdict(config.sampling),
            "reward": (config.reward, reward_fingerprint(config.reward)),
        }
    )


def _measure(
    model: DeRaModel,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    reward: Reward,
    names: Sequence[str],
) -> list[dict]:
    """The rows of a batch: with rewards, and with KL(π_λ ‖ π_ref) in nats, summed over each completion's tokens."""
    of = [prompts[completion.request.index] for completion in completions]
    rewards = score_batch(reward, of, [completion.text for completion in completions], names)
    divergences = token_kl(
        model,
        [tokens[completion.request.index] for completion in completions],
        [completion.tokens for completion in completions],
        [completion.request.lam for completion in completions],
    )
    return [
        {**completion.row(prompt), "reward": value, "kl": round(kl.sum().item(), 6)}
        for prompt, completion, value, kl in zip(of, completions, rewards, divergences, strict=True)
    ]
