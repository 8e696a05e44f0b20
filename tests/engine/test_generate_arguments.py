"""What the base's own `generate` takes, `DeRaModel.generate` takes, at any λ; or it is refused in words."""

import copy
import logging

import pytest
import torch
from compatibility import BASES
from tiny_bases import adapt, make_base
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    pipeline,
)
from transformers.cache_utils import DynamicCache, StaticCache
from two_models import TwoModels, decode_by_hand, load_two

from dera_peft import DeRaError, DeRaModel

IDS = torch.arange(3, 33).view(3, 10)
LAM = [0.0, 0.5, 1.5]
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def base_of(model_type):
    return next(base for base in BASES if base.model_type == model_type)


def two_of(peft_model):
    """The base and a copy with the adapter merged into it, apart from what is wrapped."""
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    return copy.deepcopy(peft_model).unload().eval(), aligned


@torch.no_grad()
def decode_two(reference, aligned, lam, inputs: dict, steps: int = NEW["max_new_tokens"]) -> list[list[int]]:
    """Greedy tokens of the mixture, whole sequences at each step; what counts tokens grows with them."""
    weight, tokens = torch.tensor(lam)[:, None], []
    for _ in range(steps):
        z_ref, z_aligned = (model(**inputs, use_cache=False).logits[:, -1] for model in (reference, aligned))
        assert (z_ref - z_aligned).abs().max() > 0.5
        mixed = (1 - weight) * z_ref + weight * z_aligned
        if "pixel_values" in inputs:
            mixed[:, SUPPRESSED["suppress_tokens"]] = -torch.inf
        tokens.append(mixed.argmax(-1, keepdim=True))
        fill = {"input_ids": tokens[-1], "attention_mask": torch.ones_like(tokens[-1])}
        inputs = {
            name: torch.cat(
                [value, fill.get(name, torch.full_like(tokens[-1], 0 if "mm" in name else value[0, -1]))], 1
            )
            if value.shape == inputs["input_ids"].shape
            else value
            for name, value in inputs.items()
        }
    return torch.cat(tokens, dim=1).tolist()


@pytest.mark.parametrize("adapter", ["tiny", "top"])
def test_inputs_embeds(adapter, tiny_base, request):
    adapter = request.getfixturevalue(f"{adapter}_adapter")
    reference, aligned = load_two(tiny_base, adapter)
    mixture = TwoModels(reference, aligned, torch.tensor(LAM)[:, None, None])
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected = decode_by_hand(mixture, IDS, mask, NEW["max_new_tokens"]).tolist()
    model = DeRaModel.from_pretrained(tiny_base, adapter)
    embeddings = reference.get_input_embeddings()(IDS).detach()
    for more in ({}, {"cache_implementation": "static"}):
        new = model.generate(inputs_embeds=embeddings, attention_mask=mask, lam=LAM, **NEW, **more)
        assert new.tolist() == expected
    beams = model.generate(inputs_embeds=embeddings, attention_mask=mask, lam=1.0, num_beams=3, **NEW)
    alone = aligned.generate(inputs_embeds=embeddings, attention_mask=mask, num_beams=3, **NEW)
    assert beams.tolist() == alone.tolist()


@pytest.mark.parametrize("upper", [False, True], ids=["all layers", "upper layers"])
def test_token_type_ids(upper):
    base = base_of("gpt2")
    peft_model = adapt(
        make_base(base), target_modules=base.targets, **({"layers_to_transform": [2, 3]} if upper else {})
    )
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.full_like(IDS, 5)}
    reference, aligned = two_of(peft_model)
    expected = decode_two(reference, aligned, LAM, inputs)
    plain = decode_two(reference, aligned, LAM, {k: v for k, v in inputs.items() if k != "token_type_ids"})
    assert expected != plain, "the types must matter"
    model = DeRaModel.from_peft(peft_model)
    assert model.generate(**inputs, lam=LAM, **NEW)[:, IDS.shape[1] :].tolist() == expected


TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "head_dim": 8,
}  # fmt: skip
# as deep as the text's decoder, and with projections of the same names
VISION = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
IMAGE, START = 127, 126
SUPPRESSED = {**NEW, "suppress_tokens": [IMAGE, START, 124]}  # a new token that stands for an image has none


def make_llava():
    vision = {**VISION, "model_type": "clip_vision_model", "intermediate_size": 32}
    config = LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE, image_seq_length=4
    )
    return LlavaForConditionalGeneration(config)


def make_gemma3():
    config = Gemma3Config(
        vision_config={**VISION, "intermediate_size": 32},
        text_config={**TEXT, "sliding_window": 8},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def make_qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 4, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "temporal_patch_size": 1}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        video_token_id=124,
    )
    return Qwen2VLForConditionalGeneration(config)


def with_images(make, counts) -> dict:
    """Prompts of one length with so many images each, of four tokens an image."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 120, (len(counts), 14), generator=generator)
    for row, count in enumerate(counts):
        ids[row, 1 : 1 + 5 * count] = torch.tensor([START, *[IMAGE] * 4] * count)
    images = 3 * torch.randn(sum(counts), 3, 8, 8, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
    if make is make_gemma3:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if make is make_qwen2_vl:
        inputs["pixel_values"] = torch.randn(sum(counts) * 16, 48, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * sum(counts))
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def make_with_images(make, targets):
    torch.manual_seed(0)
    base = make().eval()
    base.generation_config = GenerationConfig(pad_token_id=0)
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return adapt(base, target_modules=targets)


@pytest.mark.parametrize("make", [make_llava, make_gemma3, make_qwen2_vl], ids=lambda make: make.__name__[5:])
@pytest.mark.parametrize("layers", [r"\d", "[23]"], ids=["all layers", "upper layers"])
def test_images(make, layers):
    """As many images a sequence as it likes: they are counted by themselves, not by sequences or branches."""
    peft_model = make_with_images(make, rf".*language_model.*layers\.{layers}\..*(q_proj|v_proj|up_proj)")
    reference, aligned = two_of(peft_model)
    model = DeRaModel.from_peft(peft_model)
    assert model.fork_layer == (2 if layers == "[23]" else 0)
    for counts, lam in (([1, 2, 0], [0.5, 1.0, 0.0]), ([1, 1], [1.0, 0.0]), ([2, 1, 1], LAM)):
        inputs = with_images(make, counts)
        expected = decode_two(reference, aligned, lam, inputs)
        no_images = {n: v for n, v in inputs.items() if n in ("input_ids", "attention_mask")}
        with torch.no_grad():
            by_images = reference(**inputs).logits[:, -1] - reference(**no_images).logits[:, -1]
        assert by_images.abs().max() > 0.1
        assert model.generate(**inputs, lam=lam, **SUPPRESSED)[:, 14:].tolist() == expected
    beams = model.generate(**inputs, lam=1.0, num_beams=3, **SUPPRESSED)
    assert beams.tolist() == aligned.generate(**inputs, num_beams=3, **SUPPRESSED).tolist()


def test_images_that_the_branches_see_differently():
    peft_model = make_with_images(make_llava, ["q_proj", "v_proj"])
    reference, aligned = two_of(peft_model)
    model = DeRaModel.from_peft(peft_model)
    assert any("vision" in module.name for module in model.adapted)
    inputs = with_images(make_llava, [1, 1, 1])
    expected = decode_two(reference, aligned, LAM, inputs)
    assert model.generate(**inputs, lam=LAM, **SUPPRESSED)[:, 14:].tolist() == expected
    uneven = with_images(make_llava, [1, 2, 0])
    with pytest.raises(DeRaError, match="pixel_values does not have one entry for each of the 3 sequences"):
        model.generate(**uneven, lam=LAM, **SUPPRESSED)
    assert model.generate(**uneven, lam=1.0, **SUPPRESSED).tolist() == aligned.generate(**uneven, **SUPPRESSED).tolist()


def test_the_bases_generation_config(tiny_base, tiny_adapter):
    """As in the base's own `generate`, what is set there holds unless an argument says otherwise."""
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    for settings in (
        {"num_return_sequences": 2, "num_beams": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"repetition_penalty": 1.7},
    ):
        expected = model.generate(IDS, lam=LAM, **NEW, **settings)
        model.generation_config.update(**settings)
        found = model.generate(IDS, lam=LAM, **NEW)
        if "return_dict_in_generate" in settings:
            expected, found = expected.sequences, found.sequences
            model.generation_config.return_dict_in_generate = False
        assert found.tolist() == expected.tolist()
    lookup = {"prompt_lookup_num_tokens": 3, "num_beams": 1, "num_return_sequences": 1}
    expected = model.generate(IDS[:1], lam=0.5, **NEW, num_beams=1, num_return_sequences=1)
    model.generation_config.update(**lookup)
    assert model.generate(IDS[:1], lam=0.5, **NEW).tolist() == expected.tolist()


def static_cache(model, **kwargs):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=32, **kwargs)


@pytest.mark.parametrize("base", ["llama", "lfm2", "gemma3_text"])
@pytest.mark.parametrize("upper", [False, True], ids=["all layers", "upper layers"])
def test_a_cache_that_is_used_again(base, upper):
    """Reset, it is as new: at a λ of more rows, and of as many others."""
    base = base_of(base)
    peft_model = adapt(
        make_base(base), target_modules=base.targets, **({"layers_to_transform": [2, 3]} if upper else {})
    )
    model = DeRaModel.from_peft(peft_model)
    cache = static_cache(model)
    for lam in (0.5, 0.0, [1.0, 0.5, 0.0], [0.0, 0.5, 1.0], 1.0, 1.5):
        found = model.generate(IDS, lam=lam, past_key_values=cache, **NEW)
        assert found.tolist() == model.generate(IDS, lam=lam, **NEW).tolist()
        cache.reset()


def test_a_cache_that_was_made_for_the_sequences(tiny_base, top_adapter):
    """`early_initialization` and other models know of B rows alone."""
    model = DeRaModel.from_pretrained(tiny_base, top_adapter)
    cache = static_cache(model)
    cache.early_initialization(batch_size=3, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    expected = model.generate(IDS, lam=0.5, **NEW).tolist()
    assert model.generate(IDS, lam=0.5, past_key_values=cache, **NEW).tolist() == expected
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        load_two(tiny_base, top_adapter)[0](IDS[:, :5], past_key_values=filled)
    with pytest.raises(DeRaError, match="or by another model"):
        model.generate(IDS, lam=0.5, past_key_values=filled, **NEW)


def test_continuous_batching_is_refused(tiny_model):
    for call in (
        lambda: tiny_model.generate_batch(IDS.tolist()),
        lambda: tiny_model.init_continuous_batching(),
        lambda: tiny_model.continuous_batching_context_manager(),
        lambda: tiny_model.generate(IDS, lam=0.5, cache_implementation="paged"),
    ):
        with pytest.raises(DeRaError, match="continuous batching"):
            call()


@pytest.mark.parametrize("name", ["assistant_early_exit", "use_mtp"])
def test_drafts_without_branches_are_refused(tiny_model, name):
    with pytest.raises(DeRaError, match=name):
        tiny_model.generate(IDS[:1], lam=0.5, **{name: 1})


def test_a_pipeline_says_nothing(tiny_model, tiny_base, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pipeline("text-generation", model=tiny_model, tokenizer=tokenizer)("A fox", lam=0.5, max_new_tokens=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert "is not supported" not in caplog.text
