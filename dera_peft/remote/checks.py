"""Whether a server decodes with the model that is meant, and with λ: what it says, and what its numbers say."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dera_peft.checkpoint.identity import difference, identity, unknown
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.decoder import ANY_LAMBDA, Prompts
from dera_peft.decoding.lambdas import Lambda, NamedLambda, with_values
from dera_peft.decoding.requests import Request
from dera_peft.decoding.scoring import score
from dera_peft.engine.mixture import MixtureModel
from dera_peft.errors import DeRaError
from dera_peft.messages import warn_once
from dera_peft.remote.endpoint import Server
from dera_peft.remote.forms import mixing_fields

PROMPTS, TOKENS, TOP = 4, 4, 5  # asked for in a probe
LEAST = 1e-5  # nats, which fp32 rounds to where an adapter does nothing, or a server batches otherwise
NOISE = 2.0  # times the difference of two answers to one question: a difference of λ is more than that
# A server's log-probabilities of tokens are another model's where their mean difference from this model's is more than
SHARE = 0.25  # of the difference between λ=0 and λ=1 there, and more than
ROUNDING = 0.05  # nats, which half precision and other kernels may make

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """
    The first tokens of a greedy completion, as a server answers them.

    Attributes:
        log_p: of each token, in nats.
        first: the most probable first tokens, as texts, with their log-probabilities.
    """

    prompt: list[int]
    lam: Lambda
    tokens: list[int]
    log_p: list[float]
    first: dict[str, float]


def check_about(server: Server, about: Mapping[str, Any] | None, source: ModelSource) -> None:
    """
    Compares what a server says of its model with the model that is meant.

    Raises:
        DeRaError: it is another model, or another engine.
    """
    settings = server.settings
    if about is None:
        if settings.engine == "dera":
            raise DeRaError(
                f"{server.name} is no dera serve of this version: it does not say which model it has. Of a server of "
                "vLLM's say --engine vllm too."
            )
        warn_once(
            logger,
            f"{server.name} does not say which model it has (dera serve --engine vllm does): nothing but the λ that "
            "its answers follow is checked, and in a sweep the log-probabilities",
        )
        return
    if about.get("engine") != settings.engine:
        raise DeRaError(
            f"{server.name} is a server of the engine {about.get('engine')!r}, and engine={settings.engine!r} is said: "
            f"give --engine {about.get('engine')}."
        )
    own, its = identity(source.resolve(), source.load_arguments().get("revision")), about.get("weights")
    if (found := difference(own, its)) is not None:
        raise DeRaError(f"{server.name} serves another model than {source.name!r}: {found}.")
    assert its is not None  # which would be a difference
    if parts := unknown(own, its):
        warn_once(
            logger, f"{server.name}: whether it has the {' and the '.join(parts)} of {source.name!r} is not known"
        )
    _check_loading(server, about, source)


def _check_loading(server: Server, about: Mapping[str, Any], source: ModelSource) -> None:
    """Raises `DeRaError` where the server's base is quantized in another way, or of another dtype than is asked for."""
    own, _ = source.quantized_to()
    its = about.get("quantization")
    if its != own and its in (None, "nf4", "fp4", "int8"):
        words = {name: "unquantized" if name is None else f"quantized ({name})" for name in (own, its)}
        way_out = "leave --quantization out" if its is None else f"give --quantization {its} here, too"
        raise DeRaError(f"{server.name} has its base {words[its]}, and here it is {words[own]}: {way_out}.")
    if its != own:
        warn_once(logger, f"{server.name} has its base quantized ({its}), which changes the model a little")
    dtype = about.get("dtype")
    if source.dtype not in (None, "auto", dtype):
        raise DeRaError(f"{server.name} computes in {dtype}, and dtype={source.dtype!r} is asked for.")
    base_dtype = str(source.config.dtype).removeprefix("torch.")
    if source.dtype != dtype and its is None and base_dtype not in ("None", dtype):
        warn_once(
            logger,
            f"{server.name} computes in {dtype}, and the model here would in {base_dtype}, so that some completions "
            f"differ: --dtype {dtype} says that it is meant, and makes the rows a run of their own",
        )


def lambda_range(about: Mapping[str, Any] | None) -> tuple[float, float]:
    """The λ that a server takes, by what it says of itself."""
    given = (about or {}).get("lambda_range")
    if given is None:
        return ANY_LAMBDA
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        raise DeRaError(f"the server's range of λ is none: lambda_range={given!r}.") from None
    return low, high


def probe(
    server: Server, prompts: Prompts, requests: Sequence[Request], limits: tuple[float, float], tokens: int
) -> list[Probe]:
    """
    Asks a server for the first tokens of a few prompts at λ=0 and with each adapter at λ=1, or where its limits end.

    Args:
        limits: the least and the greatest λ that it takes; where there is one alone nothing is asked.
        tokens: as many as fit behind the prompts.

    Raises:
        DeRaError: its answers do not depend on λ, beyond what two answers to one question differ by.
    """
    lam = next((request.lam for request in requests if request.lam is not None), None)
    if lam is None:
        return []
    low, high = (min(max(end, limits[0]), limits[1]) for end in (0.0, 1.0))
    low, high = limits if low == high else (low, high)
    if low == high:
        return []
    names = list(lam) if isinstance(lam, NamedLambda) else [""]
    zero = with_values(lam, [low] * len(names))
    ends = [with_values(lam, [high if other == name else low for other in names]) for name in names]
    probes: list[Probe] = []
    noise, signals = 0.0, dict.fromkeys(names, 0.0)
    for index in list(dict.fromkeys(request.index for request in requests))[:PROMPTS]:
        _ask(server, prompts[index], zero, tokens)  # what a server keeps of a prompt is there for all that follow
        first, again = (_ask(server, prompts[index], zero, tokens) for _ in range(2))
        noise = max(noise, _distance(first, again))
        probes.append(first)
        for name, end in zip(names, ends, strict=True):
            probes.append(_ask(server, prompts[index], end, tokens))
            signals[name] = max(signals[name], _distance(first, probes[-1]))
    for name, signal in signals.items():
        if signal <= max(LEAST, NOISE * noise):
            of = f" of {name!r}" if name else ""
            raise DeRaError(
                f"{server.name}: its answers do not depend on λ{of}: at λ={low:g} and λ={high:g} the next tokens of "
                f"{len(probes) // (1 + len(names))} prompts have the same log-probabilities (they differ by "
                f"{signal:.2g} nats at most, and by {noise:.2g} between two answers to one question). Either it leaves "
                "λ aside, as vLLM does without the plugin, or the adapter does nothing: dera sweep --check, without "
                "--endpoint, tells."
            )
    return probes


def check_agreement(server: Server, probes: Sequence[Probe], model: MixtureModel) -> None:
    """
    Compares a server's log-probabilities with those of a model here.

    Raises:
        DeRaError: they are another model's.
    """
    if not probes:
        return
    points = list(dict.fromkeys(each.lam for each in probes))
    found = score(model, [each.prompt for each in probes], [each.tokens for each in probes], points)
    off: dict[Lambda, list[torch.Tensor]] = {lam: [] for lam in points}
    effects = []
    for each, scored in zip(probes, found, strict=True):
        here = scored.log_p_at_1
        off[each.lam].append((here[points.index(each.lam)] - torch.tensor(each.log_p)).abs())
        effects.append((here[1:] - here[0]).abs().flatten())
    effect = torch.cat(effects).mean().item()
    for lam, differences in off.items():
        if not (mean := torch.cat(differences).mean().item()) <= max(ROUNDING, SHARE * effect):  # NaN is no agreement
            raise DeRaError(
                f"{server.name} decodes with another model than the one that scores: at λ={lam:g} its "
                f"log-probabilities of {sum(map(len, differences))} tokens differ by {mean:.2g} nats in "
                f"the mean, while between the ends of λ they differ by {effect:.2g}. Name the base "
                "and the adapter that it serves, quantized as there."
            )


def _ask(server: Server, prompt: Sequence[int], lam: Lambda, tokens: int) -> Probe:
    body = {
        "prompt": [*prompt], "max_tokens": min(TOKENS, tokens), "temperature": 0, "logprobs": TOP, "ignore_eos": True,
        "seed": 0, "repetition_penalty": 1.0, **mixing_fields(lam, None, server.settings.engine),
    }  # fmt: skip
    answer = server.complete(body)
    try:
        logprobs = answer["logprobs"]
        drawn, log_p = answer["token_ids"], [float(value) for value in logprobs["token_logprobs"]]
        first = {str(text): float(value) for text, value in logprobs["top_logprobs"][0].items()}
        if len(log_p) != len(drawn) or not drawn:
            raise ValueError(f"{len(drawn)} tokens with {len(log_p)} log-probabilities")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DeRaError(
            f"{server.name}: an answer has no log-probabilities (logprobs={TOP}), by which it is told whether it "
            f"follows λ: {error}"
        ) from None
    return Probe([*prompt], lam, [*drawn], log_p, first)


def _distance(one: Probe, other: Probe) -> float:
    """Between two distributions of a first token, by the tokens that are likely in both."""
    both = one.first.keys() & other.first.keys()
    if not both:
        return math.inf
    return max(abs(one.first[text] - other.first[text]) for text in both)
