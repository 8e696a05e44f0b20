"""The base that a training program starts from."""

from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from dera_peft.errors import DeRaError
from dera_peft.fingerprint import file_fingerprint, weights_fingerprint
from dera_peft.objects import is_object_path, load_object


def trainer_model(model_args: ModelConfig, training_args: Any) -> dict[str, Any]:
    """
    A TRL trainer's arguments `model`, `processing_class` and, where asked for, `quantization_config`.

    `model_name_or_path` is a hub id or a folder, which TRL loads (safetensors only), or a function as path.py:name that
    returns a new model and its tokenizer.

    Raises:
        DeRaError: there is no such model.
    """
    name = model_args.model_name_or_path
    if is_object_path(name):
        model, tokenizer = load_object(name)()
        return {"model": model, "processing_class": tokenizer}
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DeRaError(f"model_name_or_path={name!r} can't be loaded: {reason}") from error
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
    }
    return {"model": name, "processing_class": tokenizer, "quantization_config": get_quantization_config(model_args)}


def model_fingerprint(name: str) -> str:
    """Of a local model's weights, or of the program that makes it; of a hub model its name."""
    if is_object_path(name):
        return file_fingerprint(name.rpartition(":")[0])
    return weights_fingerprint(name) or name
