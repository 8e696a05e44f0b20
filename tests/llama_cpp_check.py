"""
Adapters in llama.cpp, against PEFT and `DeRaModel.generate`: what `make test-llama-cpp` runs.

    python tests/llama_cpp_check.py [--only qwen3]

Of each architecture that GGUF adapters are written for, a tiny model in fp32 with an adapter whose ranks and scales
differ between modules. It must hold, of 16 prompts of unlike lengths at 16 λ from -0.5 to 2:

- the file at λ=1, scaled by llama.cpp itself, decodes what the weights scaled by λ decode (`mixing="weights"`);
- two contexts of it (examples/two_llama_cpp_contexts.py) decode what DeRa decodes.

For each, at least 12 of the completions must differ from those of the base, or else nothing is shown.
"""

import argparse
import importlib.metadata
import importlib.util
import random
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import torch
from llama_cpp import Llama
from tiny_models import make_adapter, make_tokenizer
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers import LlamaConfig as LlamaModelConfig

from dera_peft import DeRaModel
from dera_peft.checkpoint.gguf import ARCHITECTURES

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_llama_cpp_contexts.py"
CONFIGS = {"llama": LlamaModelConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LAMBDAS = [-0.5, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0] * 2
ADAPTER = {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 3}}
NEW_TOKENS = 12
SMALL = {"n_ctx": 128, "n_batch": 16, "n_threads": 1, "type_k": 0, "type_v": 0, "verbose": False}  # a cache in fp32


def make_base(kind: str, folder: Path) -> PreTrainedModel:
    """A random model of a model_type, in fp32, with a head size that is not hidden size / heads."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = CONFIGS[kind](
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16 if kind == "qwen2" else 32, max_position_embeddings=128,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_base(model: PreTrainedModel, file: Path) -> None:
    """
    The base as a GGUF file, without a tokenizer. In those of the architecture llama each head's outputs of q and k
    alternate between its first and its second half.
    """
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    head = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if architecture == "llama" and path.endswith(("q_proj", "k_proj")):
            rows = range(0, tensor.shape[0], head)
            order = [row + i + half for row in rows for i in range(head // 2) for half in (0, head // 2)]
            tensor = tensor[order]
        writer.add_tensor(f"{names.get_name(path)}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scaled(llama: Llama, adapter: Path, lam: float, example, prompt: list[int]) -> list[int]:
    """Greedy tokens of one context whose adapter llama.cpp scales by λ, as its --lora-scaled does."""
    context = example.Context(llama, example.adapted_context(llama, str(adapter), lam))
    tokens, new = [], prompt
    for _ in range(NEW_TOKENS):
        new = [int(context.read(new).argmax())]
        tokens += new
    return tokens


def check(kind: str, folder: Path) -> str:
    """What was found of an architecture; raises AssertionError where llama.cpp decodes something else."""
    spec = importlib.util.spec_from_file_location("two_llama_cpp_contexts", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    base = make_base(kind, folder / "base")
    write_base(base, folder / "base.gguf")
    adapter = make_adapter(folder / "base", folder / "adapter", **ADAPTER)
    model = DeRaModel.from_pretrained(folder / "base", adapter)
    model.export(1.0, folder / "gguf", format="gguf")
    by_weights = DeRaModel.from_pretrained(folder / "base", adapter, mixing="weights")
    llama, file = Llama(str(folder / "base.gguf"), **SMALL), folder / "gguf" / "adapter.gguf"
    two = example.TwoContexts(llama, str(file))
    rng = random.Random(7)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    same, others = {"scaled": 0, "two contexts": 0}, {"scaled": 0, "two contexts": 0}
    for lam in LAMBDAS:
        prompt = rng.choices(range(3, base.config.vocab_size), k=rng.randrange(1, 24))
        ids = torch.tensor([prompt])
        plain = model.generate(ids, lam=0.0, **options)[0, len(prompt) :].tolist()
        found = {
            "scaled": scaled(llama, file, lam, example, prompt),
            "two contexts": list(two.generate(prompt, lam, NEW_TOKENS)),
        }
        for name, mixture in (("scaled", by_weights), ("two contexts", model)):
            expected = mixture.generate(ids, lam=lam, **options)[0, len(prompt) :].tolist()
            same[name] += found[name] == expected
            others[name] += expected != plain
    for name, count in same.items():
        assert others[name] >= 12, f"{kind}: {name}: too many completions are the base's to tell them apart"
        assert count == len(LAMBDAS), f"{kind}: {name}: {count} of {len(LAMBDAS)} completions are the same"
    return ", ".join(f"{name} {count} of {len(LAMBDAS)}" for name, count in same.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(ARCHITECTURES), help="check this one; repeatable")
    given = parser.parse_args(arguments)
    print(f"llama-cpp-python {llama_cpp.__version__}, gguf {importlib.metadata.version('gguf')}")
    for kind in given.only or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kind}: {check(kind, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
