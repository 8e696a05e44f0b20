"""From the settings to what decodes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.decoder import Decoder, LocalDecoder, Prompts
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.mixture import MixtureModel
from dera_peft.remote.checks import Probe, check_about, check_agreement, lambda_range, probe
from dera_peft.remote.endpoint import EndpointDecoder, connect
from dera_peft.remote.offline import start_vllm
from dera_peft.remote.settings import RemoteSettings


@contextmanager
def open_decoder(
    settings: RemoteSettings,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[], MixtureModel],
    batch_size: int | None = None,
    *,
    scores: bool = False,
) -> Iterator[Decoder]:
    """
    What decodes `source`, until the body ends: a process of vLLM ends then, and its memory is free.

    Args:
        load: loads the model in this process, which is done where it decodes.
        batch_size: of a model in this process.
        scores: whether that model is to score the completions: a server's log-probabilities are then compared with its
            own, before anything is decoded.

    Raises:
        DeRaError: the engine can't be started or reached, or serves another model; or see `load`.
    """
    if settings.is_local:
        yield LocalDecoder(load(), tokenizer, batch_size)
        return
    settings.check_model(source)
    if settings.endpoint is None:
        with start_vllm(settings, source, tokenizer) as decoder:
            yield decoder
        return
    with connect(settings) as server:
        about = server.about()
        check_about(server, about, source)
        limits = lambda_range(about)

        probes: list[Probe] = []

        def check(prompts: Prompts, requests: Sequence[Request], sampling: Sampling) -> None:
            if not probes:
                probes.extend(probe(server, prompts, requests, limits, sampling.max_new_tokens))
                if scores:
                    check_agreement(server, probes, load())

        yield EndpointDecoder(server, tokenizer, source.end_tokens(), limits, check)
