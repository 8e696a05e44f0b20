"""What is read, checked and set before vLLM starts its engine, in the process that configures it."""

import atexit
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from dera_peft.checkpoint.base import load_config
from dera_peft.checkpoint.end_tokens import configured_end_tokens, end_tokens
from dera_peft.checkpoint.identity import describe
from dera_peft.checkpoint.source import ModelSource
from dera_peft.checkpoint.tokenizers import find_tokenizer, load_generation_config, tokenizer_places
from dera_peft.engine.rules import MAX_LAMBDA
from dera_peft.errors import DeRaError
from dera_peft.settings import nearest
from dera_peft.vllm import requests
from dera_peft.vllm.architectures import ARCHITECTURES
from dera_peft.vllm.branches import KEY, Branches
from dera_peft.vllm.command import check_branches
from dera_peft.vllm.versions import check_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

NAMES = ("adapter", "adapters", "reference", "stacked", "lambda_range")  # that a user may give in additional_config
PROCESSORS = {False: "dera_peft.vllm.rows_v1:RowWeights", True: "dera_peft.vllm.state_v2:RequestCheck"}


class ConfigureDeRa(VerifyAndUpdateConfig):
    """vLLM's hook for what an architecture asks of the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """
        Raises:
            DeRaError: base and adapters don't fit each other, or vLLM is asked for what can't be had with them.
        """
        check_version()
        check_features(vllm_config)
        model = vllm_config.model_config
        branches = read_branches(
            model.model, dict(vllm_config.additional_config or {}).get(KEY), model.revision, model.trust_remote_code
        )
        wanted = check_branches(branches)
        if model.architecture != wanted:
            raise DeRaError(f"base={branches.base!r} is decoded by {wanted}, and {model.architecture} is asked for.")
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: branches.as_json()}
        processor = PROCESSORS[vllm_config.use_v2_model_runner]
        others = [each for each in model.logits_processors or [] if each not in PROCESSORS.values()]
        model.logits_processors = [*others, processor]
        requests.current = branches
        requests.about = about_model(branches, model.quantization, model.dtype)
        end_as_trained(model, branches)


def about_model(branches: Branches, quantization: str | None, dtype: Any) -> dict[str, Any]:
    """What `GET /dera/model` answers."""
    low, high = branches.lambda_range or (-MAX_LAMBDA, MAX_LAMBDA)
    quantization = "nf4" if quantization == "bitsandbytes" else quantization
    model = describe(branches.record, branches.base_arguments.get("revision"), quantization, dtype)
    return {"engine": "vllm", "lambda_range": [low, high], **model}


def end_as_trained(model: "ModelConfig", branches: Branches) -> None:
    """Makes vLLM end completions at what ended those that the adapters were trained on, too; see `end_tokens`."""
    if model.generation_config != "auto":  # the user's own
        return
    arguments = branches.base_arguments
    config = load_generation_config(branches.base, load_config(branches.base, arguments), arguments)
    tokenizer = find_tokenizer(*tokenizer_places(branches.record), base_arguments=arguments)
    ids = end_tokens(config, tokenizer, branches.record)
    if set(ids) == set(configured_end_tokens(config)):
        return
    folder = TemporaryDirectory(prefix="dera-generation-config-")
    atexit.register(folder.cleanup)
    config.eos_token_id = ids
    config.save_pretrained(folder.name)
    model.generation_config = folder.name


def configure_architectures() -> None:
    """Makes vLLM call the hook for the architectures here."""
    MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES.values(), ConfigureDeRa))


def read_branches(base: str, given: Any, revision: str | None, trust_remote_code: bool) -> Branches:
    """
    What `additional_config["dera"]` names: a user's words, or what `Branches.as_json` made of them before.

    Raises:
        DeRaError: it does not say which adapter, or has other keys.
    """
    if not isinstance(given, dict) or not given:
        raise DeRaError(
            f"additional_config needs {KEY!r}, a mapping that names the adapter: "
            '--additional-config \'{"dera": {"adapter": "path/to/adapter"}}\'.'
        )
    if "branches" in given:
        return Branches(**given)
    if unknown := [name for name in given if name not in NAMES]:
        raise DeRaError(f"additional_config[{KEY!r}]: {unknown[0]!r} is not known; {nearest(unknown[0], NAMES)}")
    values = {name: value for name, value in given.items() if name != "lambda_range"}
    source = ModelSource.read(
        None, base=base, revision=revision, trust_remote_code=trust_remote_code or None, **values
    )  # fmt: skip
    return Branches.of_record(source.resolve(), given.get("lambda_range"), source.load_arguments())


def check_features(vllm_config: "VllmConfig") -> None:
    """Raises `DeRaError` where vLLM is asked for what was not made to work, or not tested, with forked rows."""
    parallel, offload = vllm_config.parallel_config, vllm_config.offload_config
    asked = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-lora": vllm_config.lora_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--runner pooling": vllm_config.model_config.runner_type != "generate",
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.use_ubatching,
        "--cpu-offload-gb": offload.uva.cpu_offload_gb > 0,  # puts forwards of layers back, which are changed here
        "--offload-group-size": offload.prefetch.offload_group_size > 0,
    }
    if found := [option for option, is_asked in asked.items() if is_asked]:
        raise DeRaError(f"{found[0]} does not go together with an adapter of DeRa in vLLM: leave it away.")
