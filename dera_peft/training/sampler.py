"""The SFT model as what samples: loaded for inference, quantized where asked for, with the adapter that makes it."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dera_peft.checkpoint.adapters import check_adapter
from dera_peft.checkpoint.loading import load_base, load_config, make_skeleton
from dera_peft.training.models import Source


def load_sft_model(
    source: Source, quantization: str | None = None, dtype: str = "auto", device_map: Any = None
) -> PreTrainedModel:
    """
    The SFT model, in evaluation mode.

    Args:
        source: from `find_source`. Its adapter, if it has one, is loaded by PEFT into the base, and not merged.
        quantization: None, "nf4" or "fp4" (with double quantization, as QLoRA trains), or "int8".
        dtype: of the weights, by name; "auto" is that of the checkpoint.
        device_map: as in transformers.

    Raises:
        DeRaError: the adapter does not fit the base, or the base can't be loaded or quantized here.
    """
    hub = {"revision": source.revision} if source.revision is not None else {}
    config = load_config(source.base, hub)
    skeleton = make_skeleton(config)
    if source.adapter is not None:
        check_adapter(source.adapter, source.base, skeleton)
    model = load_base(
        source.base, config, quantization, dtype, device_map, skeleton=skeleton, argument="model_name_or_path", **hub
    )
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, source.adapter).get_base_model()
    return model.eval()
