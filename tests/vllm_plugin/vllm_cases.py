"""
The bases, adapters and requests that vLLM is compared on. Run in the project's environment, it writes them, with the
tokens that `DeRaModel.generate` makes of them in fp32 on a CPU:

    python tests/vllm_plugin/vllm_cases.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

VOCABULARY, NEW = 320, 20
LAMBDAS = (0.0, 0.5, 1.0, 1.5, -0.5)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # of Phi-3

# base -> what the adapter is like, beside rank 4 on all linear layers
ADAPTERS = {
    "whole": {},
    "upper": {"layers_to_transform": [2, 3]},
    "patterns": {
        "r": 3,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5, "layers.2.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 20},
        "exclude_modules": ["o_proj"],
    },
}


def requests(names: tuple[str, ...] = ()) -> list[dict]:
    """
    16 requests with λ, of unlike lengths; half of them begin alike, for longer than a block of the KV cache.

    Args:
        names: of several adapters, whose λ each request has by name.
    """
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(70)]
    found = []
    for index in range(16):
        own = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(3, 30))]
        lam = LAMBDAS[index % len(LAMBDAS)]
        if names:
            lam = {name: LAMBDAS[(index + place) % len(LAMBDAS)] for place, name in enumerate(names)}
        found.append({"prompt": shared + own if index % 2 else own, "lambda": lam})
    return found


def write_case(folder: Path, base, adapters: dict[str, dict], **source) -> None:
    """
    A base, its adapters, and `expected.json`: what comes of the requests.

    Args:
        adapters: name -> its config; of one name that of `adapter`, of several those of `adapters`.
        source: further arguments of `DeRaModel.from_pretrained`; `reference` names adapters among these.
    """
    from tiny_models import make_adapter, make_tokenizer

    from dera_peft import DeRaModel
    from dera_peft.engine.padding import pad

    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, (name, config) in enumerate(adapters.items(), 1):
        config = {"target_modules": PACKED if base.config.model_type == "phi3" else LINEAR, **config}
        make_adapter(folder / "base", folder / name, seed=seed, scale=2.0, **config)
    reference = [str(folder / name) for name in source.pop("reference", ())]
    aligned = {name: str(folder / name) for name in adapters if str(folder / name) not in reference}
    named = {"adapter": next(iter(aligned.values()))} if len(aligned) == 1 else {"adapters": aligned}
    model = DeRaModel.from_pretrained(str(folder / "base"), reference=reference, **named, **source)
    wanted = requests(tuple(aligned) if len(aligned) > 1 else ())
    ids, mask = pad([each["prompt"] for each in wanted], 0, left=True)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    lam = [each["lambda"] for each in wanted]
    tokens = model.generate(ids, attention_mask=mask, lam=lam, **options)[:, ids.shape[1] :].tolist()
    logits = model(ids, attention_mask=mask, lam=lam).logits.log_softmax(-1)
    plain = model.generate(
        ids, attention_mask=mask, lam=0.0 if len(aligned) == 1 else dict.fromkeys(aligned, 0.0), **options
    )
    different = sum(one != other for one, other in zip(tokens, plain[:, ids.shape[1] :].tolist(), strict=True))
    assert different > 8, f"{folder.name}: λ changes {different} of 16 completions, too few to tell"
    for each, one, row in zip(wanted, tokens, logits, strict=True):
        prompt = each["prompt"]
        each["tokens"] = one
        own = row[-len(prompt) :]
        each["prompt_logprobs"] = [own[i - 1, prompt[i]].item() for i in range(1, len(prompt))]
    named = {**named, "reference": reference, **source}
    (folder / "expected.json").write_text(json.dumps({"dera": named, "requests": wanted}), encoding="utf-8")


def make_base(kind: str):
    """A random fp32 model of four layers, whose sizes vLLM's attention on a CPU has a kernel for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = {
        "qwen3": {"head_dim": 32},
        "gemma": {"head_dim": 32},
        "mistral": {"head_dim": 32, "sliding_window": 48},
        "phi3": {"num_key_value_heads": 1},  # which both of two tensor-parallel ranks have
    }
    sizes = {"num_key_value_heads": 2, **own.get(kind, {})}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms and biases too, which start at ones and zeros
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def main(folder: Path) -> None:
    for kind in ("llama", "qwen3"):
        for name, config in ADAPTERS.items():
            write_case(folder / f"{kind}-{name}", make_base(kind), {"aligned": config})
    for kind in ("qwen2", "mistral", "gemma", "phi3"):
        write_case(folder / f"{kind}-upper", make_base(kind), {"aligned": ADAPTERS["upper"]})
    write_case(folder / "llama-two", make_base("llama"), {"kind": {}, "brief": {"layers_to_transform": [1, 3]}})
    write_case(
        folder / "llama-stacked", make_base("llama"), {"sft": {}, "aligned": ADAPTERS["upper"]}, reference=("sft",)
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]))
