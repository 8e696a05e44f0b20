"""
The bases and the kinds of adapters that the tests try, as one list from which `docs/compatibility.md` is made.

    python tests/compatibility.py > docs/compatibility.md
"""

from dataclasses import dataclass, field

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, XLoraConfig
from transformers import AutoConfig

VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
SMALL_HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FUSED_GPT = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
SHARED_KEYS = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
MIXED_LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


@dataclass(frozen=True)
class Base:
    """A tiny model of one architecture, and the modules that an adapter for it targets."""

    model_type: str
    targets: list[str]
    settings: dict = field(default_factory=dict)
    note: str = ""
    common: dict = field(default_factory=lambda: COMMON)
    forks_above_input: bool = True

    def config(self):
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return AutoConfig.for_model(self.model_type, **{**self.common, **ids, **self.settings})


BASES = [
    Base("llama", LINEAR),
    Base("mistral", LINEAR, {"sliding_window": 4}, "sliding window"),
    Base("qwen2", LINEAR),
    Base("qwen3", LINEAR, SMALL_HEADS),
    Base("gemma", LINEAR, SMALL_HEADS),
    Base(
        "gemma2",
        LINEAR,
        {**SMALL_HEADS, "sliding_window": 4, "final_logit_softcapping": 5.0},
        "soft-capped logits: joined behind the head",
    ),
    Base("gemma3_text", LINEAR, {**SMALL_HEADS, "sliding_window": 4}, "sliding window"),
    Base("phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    Base("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], {"sliding_window": None}, "fused projections"),
    Base("olmo2", LINEAR),
    Base(
        "granite",
        LINEAR,
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
        "scaled logits",
    ),
    Base("cohere", LINEAR, {"logit_scale": 0.25}, "scaled logits"),
    Base("smollm3", LINEAR, {"no_rope_layer_interval": 2}, "layers without rotary embeddings"),
    Base("stablelm", LINEAR),
    Base("nemotron", [*ATTENTION, "up_proj", "down_proj"]),
    Base("glm4", [*ATTENTION, "gate_up_proj", "down_proj"], SMALL_HEADS),
    Base("starcoder2", [*ATTENTION, "c_fc", "c_proj"], {"sliding_window": None}),
    Base("gpt2", ["c_attn", "c_proj", "c_fc"], note="`Conv1D` layers, in `transformer.h`"),
    Base("gptj", ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], {"rotary_dim": 4}),
    Base("gpt_neox", FUSED_GPT, note="fused projections"),
    Base(
        "gpt_bigcode",
        ["c_attn", "c_proj", "c_fc"],
        note="always forks at the input",
        forks_above_input=False,
    ),
    Base(
        "opt",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3},
        "folds tokens into rows",
    ),
    Base("bloom", FUSED_GPT, note="ALiBi"),
    Base("falcon", FUSED_GPT, {"new_decoder_architecture": True, "num_kv_heads": 2}, "grouped queries"),
    Base("falcon", FUSED_GPT, {"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
    Base(
        "mpt",
        ["Wqkv", "out_proj", "up_proj", "down_proj"],
        {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
        "ALiBi; always forks at the input",
        common={"vocab_size": VOCABULARY, "initializer_range": 0.3},
        forks_above_input=False,
    ),
    Base(
        "gpt_oss",
        ATTENTION,
        {**SMALL_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        "experts",
    ),
    Base(
        "deepseek_v3",
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        "latent attention, experts",
    ),
    Base(
        "mixtral",
        ATTENTION,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "experts",
    ),
    Base("qwen3_moe", ATTENTION, {**SMALL_HEADS, **EXPERTS}, "experts"),
    Base(
        "llama4_text",
        ATTENTION,
        {
            **SMALL_HEADS,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 4,
        },
        "experts, attention in chunks",
    ),
    Base(
        "gemma3n_text",
        LINEAR,
        {
            **SMALL_HEADS,
            **SHARED_KEYS,
            "intermediate_size": [64] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
        "upper layers reuse keys and values of lower ones; always forks at the input",
        forks_above_input=False,
    ),
    Base(
        "gemma4_text",
        LINEAR,
        {**SMALL_HEADS, **SHARED_KEYS, "global_head_dim": 8},
        "upper layers reuse keys and values of lower ones",
    ),
    Base(
        "jamba",
        [*ATTENTION, "in_proj"],
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "recurrent state (Mamba), experts",
    ),
    Base(
        "bamba",
        [*LINEAR, "in_proj"],
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        "recurrent state (Mamba 2)",
    ),
    Base(
        "qwen3_next",
        [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"],
        {
            **SMALL_HEADS,
            **EXPERTS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": MIXED_LAYERS,
        },
        "recurrent state (gated delta rule), experts",
    ),
    Base(
        "lfm2",
        ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"],
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 8},
        "convolutional state",
    ),
]

ENCODER_DECODERS = [
    Base(
        "t5",
        ["q", "k", "v", "o", "wi", "wo"],
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0},
        "forks at the encoder's input",
        common={"vocab_size": VOCABULARY, "initializer_factor": 1.0},
    ),
    Base(
        "bart",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "init_std": 0.3,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        "forks at the encoder's input",
        common={"vocab_size": VOCABULARY, "max_position_embeddings": 128},
    ),
]


@dataclass(frozen=True)
class Kind:
    """A way to adapt a tiny Llama (or GPT-2) that works."""

    name: str
    settings: dict
    scales: bool = True  # by λ, with mixing="weights" and in an export
    base: str = "llama"


KINDS = [
    Kind("LoRA", {}),
    Kind("LoRA on some layers (`layers_to_transform`)", {"layers_to_transform": [2, 3]}),
    Kind(
        "rank and alpha patterns",
        {"rank_pattern": {"q_proj": 2, "layers.3.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3}},
    ),
    Kind("rsLoRA", {"use_rslora": True}),
    Kind("DoRA", {"use_dora": True}, scales=False),
    Kind("`lora_bias`", {"lora_bias": True}),
    Kind("an adapter on the embeddings", {"target_modules": ["q_proj", "embed_tokens"]}),
    Kind("DoRA on the embeddings", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, scales=False),
    Kind("an adapter on the head", {"target_modules": ["v_proj", "lm_head"]}),
    Kind("an adapter on the head alone", {"target_modules": ["lm_head"]}),
    Kind("an adapter on the embeddings of a tied base", {"target_modules": ["q_proj", "embed_tokens"]}, base="tied"),
    Kind("`trainable_token_indices`", {"trainable_token_indices": [5, 6, 7, 8, 9]}),
    Kind(
        "tied adapters on embeddings and head (`ensure_weight_tying`)",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        base="tied",
    ),
    Kind(
        "`modules_to_save`: embeddings and head, tied (`ensure_weight_tying`)",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        base="tied",
    ),
    Kind(
        "`trainable_token_indices` of a tied base",
        {"trainable_token_indices": [5, 6, 7, 8, 9]},
        base="tied",
    ),
    Kind("`modules_to_save`: the head", {"modules_to_save": ["lm_head"]}),
    Kind("`modules_to_save`: embeddings and norms", {"modules_to_save": ["embed_tokens", "norm"]}, scales=False),
    Kind("LoRA on `Conv1D` (GPT-2)", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, base="gpt2"),
]


# biases of the base's own modules, which the tests train; compared with two models, the one loaded by PEFT
BIASES = [
    Kind('`bias="lora_only"`', {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"]}, base="gpt2"),
    Kind(
        '`bias="lora_only"` on some layers',
        {"bias": "lora_only", "target_modules": ["q_proj", "v_proj", "fc1"], "layers_to_transform": [2, 3]},
        base="phi",
    ),
    Kind('`bias="all"`', {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}, base="gpt2"),
    Kind('`bias="all"`, the head\'s too', {"bias": "all", "target_modules": ["q_proj", "fc2"]}, base="phi"),
    Kind('`bias="all"` with DoRA', {"bias": "all", "target_modules": ["fc1"], "use_dora": True}, False, base="phi"),
]

# on what stands in a mixture's blocks; PEFT 0.21 takes "all-linear" to mean experts and router too
PARAMETERS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
EXPERT_KINDS = [
    *(
        Kind(
            f'`target_modules="all-linear"` of {base}: experts and router',
            {"target_modules": "all-linear"},
            False,
            base,
        )
        for base in ("mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next")
    ),
    *(Kind(f"experts of {base} (`target_parameters`)", PARAMETERS, False, base) for base in ("gpt_oss", "llama4_text")),
    Kind(
        "experts, router and attention of gpt_oss, in some layers",
        {
            "target_modules": ["q_proj"],
            "target_parameters": [f"{i}.mlp.{name}" for i in (2, 3) for name in ("experts.down_proj", "router.weight")],
            "layers_to_transform": [2, 3],
        },
        False,
        "gpt_oss",
    ),
    Kind(
        "a router alone (`target_parameters`)", {**PARAMETERS, "target_parameters": ["gate.weight"]}, False, "mixtral"
    ),
]


@dataclass(frozen=True)
class Refused:
    """An adapter that is refused, by its config, with what the message says."""

    name: str
    config: PeftConfig
    message: str
    instead: str


REFUSED = [
    Refused(
        "`bias` with `modules_to_save`",
        LoraConfig(bias="all", modules_to_save=["lm_head"]),
        "bias='all'",
        '`bias="none"`, or `lora_bias=True`',
    ),
    Refused(
        "PiSSA, OLoRA, CorDA, LoftQ, ... (the base is changed when they start)",
        LoraConfig(init_lora_weights="pissa"),
        "'pissa'",
        "save them with `path_initial_model_for_weight_conversion`, as plain LoRA",
    ),
    Refused("OLoRA", LoraConfig(init_lora_weights="olora"), "'olora'", "the same"),
    Refused("aLoRA", LoraConfig(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens", "LoRA that is always on"),
    Refused(
        "X-LoRA",
        XLoraConfig(hidden_size=32, adapters={"a": "./a"}),
        "XLORA",
        "its adapters, as several, weighted by λ",
    ),
    Refused("IA3", IA3Config(), "IA3", "LoRA"),
    Refused("VeRA", VeraConfig(), "VERA", "LoRA, or `peft.convert_to_lora`"),
    Refused("prompt tuning", PromptTuningConfig(), "PROMPT_TUNING", "LoRA"),
    Refused("prefix tuning", PrefixTuningConfig(), "PREFIX_TUNING", "LoRA"),
]

INTRODUCTION = """# What works

Made by `python tests/compatibility.py` from the list that the tests run: do not edit it by hand.

Each base is built tiny, with random weights in fp32, and compared with two separate models whose logits are mixed by
the formula: `forward`, and `generate` with a cache (greedy and 4 beams), on a padded batch with one λ a row.
It is compared twice: with an adapter on all layers, and with one on the upper half, where the lower layers are computed
and cached once ("forks above the input"). No base has code of its own in this package: other architectures of
transformers work the same way, or fail with an error.

`make serve-check` compares the server's engine with `generate` on each decoder-only base: 16 requests of unlike lengths
and λ that join and leave a running batch. All of them had the tokens of `generate` when it was last run, on a CPU.
"""
QUANTIZED = """## Quantized bases

The base layer is called as it is, so any quantization that PEFT has a LoRA layer for works: `quantization="nf4"`,
`"fp4"` and `"int8"` (bitsandbytes), or transformers' own `quantization_config` (torchao, GPTQ, AWQ, HQQ). Tested on
the CPU: bitsandbytes NF4, FP4 and int8, and torchao int8 and int4 weights where torchao is installed. Layers that are
offloaded to the CPU or to disk (`device_map`) take plain LoRA on linear layers.

LLM.int8() chooses its outlier columns over the whole batch, so the numbers of a row depend on the rows beside it: with
int8, λ=0 in a mixed batch is the reference only to the precision of int8. The 4-bit types have no such dependence.

On a CPU with AVX512-BF16, bitsandbytes decodes with a 4-bit kernel that computes in bf16 and has no backward. Training,
and a model wrapped by `from_peft`, keep to the kernel of other CPUs.
"""


def main() -> None:
    print(INTRODUCTION)
    print("## Decoder-only bases\n\n| base | result | forks above the input | note |\n| --- | --- | --- | --- |")
    for base in BASES:
        print(f"| {base.model_type} | works | {'yes' if base.forks_above_input else 'no'} | {base.note} |")
    print("\n## Encoder-decoder bases\n\n| base | result | note |\n| --- | --- | --- |")
    for base in ENCODER_DECODERS:
        print(f"| {base.model_type} | works | {base.note} |")
    print("\n" + QUANTIZED)
    print("## Adapters\n\nCompared with PEFT's own forward, adapter on and off; saved, loaded and compared again.\n")
    print('| adapter | result | `mixing="weights"` and `export` |\n| --- | --- | --- |')
    for kind in KINDS:
        print(f"| {kind.name} | works | {'yes' if kind.scales else 'refused: its weights do not scale'} |")
    for kind in EXPERT_KINDS:
        print(f"| {kind.name} | works | {'yes' if kind.scales else 'refused: its weights do not scale'} |")
    for kind in BIASES:
        result = "works when loaded from its folder; `from_peft` and training refuse it"
        print(f"| {kind.name} | {result} | {'yes' if kind.scales else 'refused: its weights do not scale'} |")
    for refused in REFUSED:
        print(f"| {refused.name} | refused; instead: {refused.instead} | |")
    print("\n`output_hidden_states` and `output_attentions` are refused: each branch has its own.")


if __name__ == "__main__":
    main()
