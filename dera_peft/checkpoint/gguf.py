"""An adapter as llama.cpp reads it: a GGUF file of LoRA factors, and a Modelfile for Ollama."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig

from dera_peft.checkpoint.adapter_file import PREFIX, AdapterFile
from dera_peft.checkpoint.base import make_skeleton
from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_NAME, MODELFILE = "adapter.gguf", "Modelfile"
# transformers' model_type -> llama.cpp's architecture: those that tests/llama_cpp_check.py runs there against PEFT
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROTATES_NEIGHBOURS = ("llama",)  # architectures that pair a head's outputs 2i and 2i+1, not i and i + half
OF_LINEAR_LAYERS = ("bias", "modules_to_save", "trainable_token_indices", "use_dora", "lora_bias", "target_parameters")
MODELFILE_TEXT = """# ollama create NAME -f Modelfile
# The base as GGUF, made by llama.cpp: python convert_hf_to_gguf.py {base} --outfile base.gguf
FROM ./base.gguf
# {strengths}; Ollama applies an adapter as it is, with no scale of its own
ADAPTER ./{adapter}
{stops}"""


def check_can_be_gguf(config: PreTrainedConfig, base: str) -> None:
    """
    Args:
        config: the base's.
        base: its name, for messages.

    Raises:
        DeRaError: the base is of another architecture than those that were tested, or the package gguf is missing.
    """
    if config.model_type not in ARCHITECTURES:
        raise DeRaError(
            f"base={base!r} is of the architecture {config.model_type!r}; GGUF adapters are written for "
            f"{', '.join(ARCHITECTURES)}. llama.cpp's convert_lora_to_gguf.py knows more, and reads what "
            "--format peft writes."
        )
    if find_spec("gguf") is None:
        raise DeRaError("--format gguf needs the package gguf: pip install 'dera-peft[gguf]'")


def write_gguf(adapter: Path, config: PreTrainedConfig, file: Path) -> None:
    """
    Writes the adapter in the folder `adapter` as a file that llama.cpp's `--lora` and `--lora-scaled` take.

    Its factors are in float32. A factor B takes in what the file's one `alpha` can't say: rsLoRA, and ranks and alphas
    of single modules.

    Args:
        config: the base's.

    Raises:
        DeRaError: the adapter has more than LoRA on linear layers, or adapts the head or the embeddings.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map

    found = AdapterFile.read(str(adapter), "the adapter")
    for option in OF_LINEAR_LAYERS:
        if (value := getattr(found.config, option)) not in (None, False, "none", {}, []):
            raise DeRaError(f"the adapter has {option}={value!r}; a GGUF adapter has LoRA on linear layers alone.")
    architecture = ARCHITECTURES[config.model_type]
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(cast("MODEL_ARCH", known[architecture]), config.num_hidden_layers)
    writer = GGUFWriter(file, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha := float(found.config.lora_alpha))
    tensors = found.tensors()
    skeleton = make_skeleton(config)
    head, embeddings = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    ends = [name for name, module in skeleton.named_modules() if module in (head, embeddings)]
    for name, layer in _lora_layers(skeleton, found):
        if name in ends or not isinstance(layer, LoraLinear):
            raise DeRaError(f"{name}: a GGUF adapter is for the linear layers of the decoder, and none other.")
        own = names.get_name(name)
        if own is None:
            raise DeRaError(f"{name}: llama.cpp's {architecture} has no such weight.")
        a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
        rank, (scaling,) = a.shape[0], layer.scaling.values()
        if architecture in ROTATES_NEIGHBOURS:
            b = _reorder(b, name, config)
        _add(writer, f"{own}.weight.lora_a", a)
        _add(writer, f"{own}.weight.lora_b", b if scaling == alpha / rank else b * (scaling * rank / alpha))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(base: str, strengths: str, stops: Sequence[str]) -> str:
    """
    An Ollama Modelfile for `FILE_NAME` beside it.

    Args:
        base: its name.
        strengths: λ in words.
        stops: texts that end a completion.
    """
    lines = "".join(f'PARAMETER stop "{text}"\n' for text in stops)
    return MODELFILE_TEXT.format(base=base, strengths=strengths, adapter=FILE_NAME, stops=lines)


def _lora_layers(skeleton: Any, file: AdapterFile) -> list[tuple[str, LoraLayer]]:
    """The modules that PEFT adapts, by name, with the scaling that it gives each."""
    model = PeftModel(skeleton, file.config)
    return [(name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]


def _reorder(b: torch.Tensor, name: str, config: PreTrainedConfig) -> torch.Tensor:
    """`[out, r]` with the rows of each head of q or k in the order in which llama.cpp's files have them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return b
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: "GGUFWriter", name: str, tensor: torch.Tensor) -> None:
    writer.add_tensor(name, tensor.contiguous().numpy())
