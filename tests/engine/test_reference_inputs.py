"""Branches with prompts of their own, against two separate models with two prompts, token for token."""

import copy

import pytest
import torch
from captured import watch
from compatibility import BASES, ENCODER_DECODERS, VOCABULARY
from tiny_bases import adapt, make_base
from transformers.cache_utils import StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput
from two_models import TwoModels, TwoPrompts, last_logits

from dera_peft import DeRaError
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import WITHOUT_ADAPTERS

LAM = [0.0, 0.5, 1.0, 3.0]
NEW = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def make_prompts(length: int, seed: int, padding: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (len(padding), length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


SHORT, LONG = make_prompts(5, 2, [2, 0, 0, 3]), make_prompts(11, 3, [0, 4, 7, 2])
UNPADDED, ANOTHER = make_prompts(7, 4, [0] * 4), make_prompts(4, 5, [0] * 4)


def repeated(inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, torch.Tensor]:
    return {name: value.repeat_interleave(repeats, dim=0) for name, value in inputs.items()}


def make_models(base, adapter: dict | None) -> tuple:
    """(reference, aligned, the mixture), three separate models; without an adapter the first two are the same."""
    reference = make_base(base)
    if adapter is None:
        return reference, reference, MixtureModel(copy.deepcopy(reference), WITHOUT_ADAPTERS)
    peft_model = adapt(copy.deepcopy(reference), target_modules=base.targets, **adapter)
    return reference, copy.deepcopy(peft_model).merge_and_unload().eval(), MixtureModel.from_peft(peft_model)


def two_of(reference, aligned, lam, inputs, prompts, repeats=1) -> TwoPrompts:
    weight = torch.tensor(lam).repeat_interleave(repeats)[:, None, None]
    return TwoPrompts(reference, aligned, weight, inputs["input_ids"].shape[1], repeated(prompts, repeats))


def by_two(reference, aligned, inputs, prompts, lam=LAM, repeats=1, **options) -> list[list[int]]:
    two = two_of(reference, aligned, lam, inputs, prompts, repeats)
    torch.manual_seed(0)
    return two.generate(**inputs, **{**NEW, **options}, use_cache=False).tolist()


def by_one(model, inputs, prompts, lam=LAM, **options) -> list[list[int]]:
    torch.manual_seed(0)
    return model.generate(**inputs, reference_inputs=prompts, lam=lam, **{**NEW, **options}).tolist()


def base_of(model_type: str, note: str = ""):
    return next(base for base in BASES if base.model_type == model_type and note in base.note)


ARCHITECTURES = [
    base_of("mistral"), base_of("gemma2"), base_of("phi"), base_of("gpt2"), base_of("opt"), base_of("bloom"),
    base_of("mpt"), base_of("falcon", "ALiBi"), base_of("llama4_text"), base_of("gemma4_text"), base_of("lfm2"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("base", ARCHITECTURES, ids=lambda base: f"{base.model_type} {base.note}".strip())
def test_architectures(base):
    reference, _, model = make_models(base, None)
    assert by_two(reference, reference, SHORT, LONG, [0.0] * 4) != by_two(reference, reference, SHORT, LONG, [1.0] * 4)
    for inputs, prompts in ((SHORT, LONG), (LONG, SHORT)):
        assert by_one(model, inputs, prompts) == by_two(reference, reference, inputs, prompts)
    beams = by_one(model, SHORT, LONG, num_beams=3)
    assert beams == by_two(reference, reference, SHORT, LONG, repeats=3, num_beams=3)


@pytest.fixture(scope="module", params=[None, {"layers_to_transform": [2, 3]}], ids=["no adapter", "adapter"])
def models(request):
    return make_models(base_of("llama"), request.param)


MODES = {
    "greedy": ({}, 1),
    "no cache": ({"use_cache": False}, 1),
    "sampling": ({"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}, 3),
    "beams": ({"num_beams": 4, "num_return_sequences": 2}, 4),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, 2),
    "repetition penalty": ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, 1),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, 1),
    "static cache, beams": ({"cache_implementation": "static", "disable_compile": True, "num_beams": 3}, 3),
    "chunked prefill": ({"prefill_chunk_size": 3}, 1),
    "chunked prefill, static": (
        {"prefill_chunk_size": 4, "cache_implementation": "static", "disable_compile": True, "num_beams": 2},
        2,
    ),
}
LOCAL = ("use_cache", "cache_implementation", "disable_compile", "prefill_chunk_size")  # no matter of the tokens


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("longer", ["reference", "aligned"])
def test_modes(models, mode, longer):
    reference, aligned, model = models
    inputs, prompts = (SHORT, LONG) if longer == "reference" else (LONG, SHORT)
    options, repeats = MODES[mode]
    plain = {name: value for name, value in options.items() if name not in LOCAL}
    expected = by_two(reference, aligned, inputs, prompts, repeats=repeats, **plain)
    found = by_one(model, inputs, prompts, **options)
    assert found == expected
    count = inputs["input_ids"].shape[1]
    assert torch.tensor(found)[:: len(found) // 4, :count].equal(inputs["input_ids"])


@torch.no_grad()
def test_what_works_on_one_sequence(models):
    reference, aligned, model = models
    inputs, prompts = ({name: value[1:2] for name, value in each.items()} for each in (SHORT, LONG))
    repeating = {name: torch.cat([value[:, 4:]] * 3, dim=1) for name, value in prompts.items()}
    expected = by_two(reference, aligned, inputs, repeating, [1.5], max_new_tokens=12)
    found = by_one(model, inputs, repeating, [1.5], max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert found == expected
    seen = []

    class Kept(BaseStreamer):
        def put(self, value):
            seen.append(value.flatten().tolist())

        def end(self):
            seen.append("end")

    by_one(model, inputs, prompts, [1.5], streamer=Kept())
    (tokens,) = by_two(reference, aligned, inputs, prompts, [1.5])
    assert seen == [tokens[:5], *([token] for token in tokens[5:]), "end"]


@torch.no_grad()
@pytest.mark.parametrize("length", ["reference", "aligned"])
def test_captured_steps(models, length):
    reference, aligned, model = models
    inputs, prompts = (SHORT, LONG) if length == "reference" else (LONG, SHORT)
    captures, recorder = model._captures, watch(model, torch.device("cpu"))
    try:
        for lam in (LAM, [3.0, 0.5, 1.0, 0.0], LAM):
            assert by_one(model, inputs, prompts, lam, max_new_tokens=9, capture=True) == by_two(
                reference, aligned, inputs, prompts, lam, max_new_tokens=9
            )
        assert recorder.replays
        if model.branches_differ:  # the same structure but for the prompts
            assert (
                model.generate(**inputs, **NEW, lam=LAM, capture=True).tolist()
                == TwoModels(reference, aligned, torch.tensor(LAM)[:, None, None])
                .generate(**inputs, **NEW, use_cache=False)
                .tolist()
            )
    finally:
        model._captures = captures


@torch.no_grad()
def test_rows_that_are_computed(models):
    """One for each branch that a sequence needs; at λ=0 the reference's prompts alone, at λ=1 the others."""
    reference, aligned, model = models
    shapes = []
    embeddings = model.base.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    for lam, rows, columns in ((0.0, 4, 11), (1.0, 4, 5), (0.5, 8, 11), (LAM, 6, 11)):
        shapes.clear()
        found = by_one(model, SHORT, LONG, lam)
        assert shapes == [(rows, columns), *[(rows, 1)] * 5]
        if lam == 1.0:
            assert found == aligned.generate(**SHORT, **NEW).tolist()
        elif lam == 0.0:
            assert [row[5:] for row in found] == reference.generate(**LONG, **NEW)[:, 11:].tolist()
    handle.remove()


@torch.no_grad()
def test_logits(models):
    """z = (1+r)·z_with - r·z_without (Linear Alignment) is the mixture at λ=1+r, at each token of one completion."""
    reference, aligned, model = models
    completion = torch.randint(3, VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(6))
    with_it, without = (torch.cat([each["input_ids"], completion], dim=1) for each in (UNPADDED, ANOTHER))
    r = 2.0
    z_with, z_without = aligned(with_it).logits[:, -4:], reference(without).logits[:, -4:]
    assert (z_with - z_without).abs().max() > 1
    expected = (1 + r) * z_with - r * z_without
    found = model(with_it, reference_inputs={"input_ids": without}, lam=1 + r, logits_to_keep=4)
    torch.testing.assert_close(found.logits, expected, atol=2e-4, rtol=1e-5)
    found = model(with_it, reference_inputs={"input_ids": without}, lam=0.3, output_branches=True)
    assert found.logits.shape == (4, 7, VOCABULARY), "the columns that both have"
    torch.testing.assert_close(found.branch_logits["aligned"][:, -4:], z_with, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(found.branch_logits["reference"][:, -4:], z_without, atol=2e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("negative", [ANOTHER, None], ids=["negative prompt", "last token"])
@pytest.mark.parametrize("scale", [3.0, 0.0, 1.0])
def test_guidance_is_that_of_transformers(negative, scale):
    base, _, model = make_models(base_of("llama"), None)
    given = {} if negative is None else {"negative_prompt_ids": negative["input_ids"]}
    for options in ({}, {"do_sample": True}):
        texts = []
        for each in (base, model):
            torch.manual_seed(0)
            texts.append(each.generate(**UNPADDED, **{**NEW, **given, **options}, guidance_scale=scale).tolist())
        assert texts[0] == texts[1]
    if scale != 1:
        plain = base.generate(**UNPADDED, **NEW).tolist()
        base.generation_config.guidance_scale = model.generation_config.guidance_scale = scale
        by_config = base.generate(**UNPADDED, **NEW, **given).tolist()
        assert plain != by_config == model.generate(**UNPADDED, **NEW, **given).tolist()


class TwoSources(TwoModels):
    """Two whole encoder-decoders, each with a source of its own."""

    def __init__(self, reference, aligned, lam, inputs: dict, prompts: dict):
        super().__init__(reference, aligned, lam)
        self.config = copy.deepcopy(self.config)
        self.config.is_encoder_decoder = False
        self.inputs, self.prompts = inputs, prompts

    def forward(self, input_ids, **kwargs):
        z_ref = self.reference(**self.prompts, decoder_input_ids=input_ids, use_cache=False).logits
        z_aligned = self.aligned(**self.inputs, decoder_input_ids=input_ids, use_cache=False).logits
        return CausalLMOutput(logits=(1 - self.lam) * z_ref + self.lam * z_aligned)


@torch.no_grad()
@pytest.mark.parametrize("adapter", [None, {"task_type": "SEQ_2_SEQ_LM"}], ids=["no adapter", "adapter"])
@pytest.mark.parametrize("base", ENCODER_DECODERS, ids=lambda base: base.model_type)
def test_encoder_decoders(base, adapter):
    reference, aligned, model = make_models(base, adapter)
    inputs, prompts = ({name: value.flip(1) for name, value in each.items()} for each in (SHORT, LONG))
    start = torch.full((4, 1), reference.generation_config.decoder_start_token_id)

    def two(lam, repeats=1):
        weight = torch.tensor(lam).repeat_interleave(repeats)[:, None, None]
        return TwoSources(reference, aligned, weight, repeated(inputs, repeats), repeated(prompts, repeats))

    assert two([0.0] * 4).generate(start, **NEW).tolist() != two([1.0] * 4).generate(start, **NEW).tolist()
    for lam in (LAM, [1.0, 0.0, 1.0, 0.0]):
        assert by_one(model, inputs, prompts, lam) == two(lam).generate(start, **NEW).tolist()
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        beams = by_one(model, inputs, prompts, num_beams=3, **cache)
        assert beams == two(LAM, 3).generate(start, **NEW, num_beams=3).tolist()
    decoder = {"decoder_input_ids": torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(5))}
    found = model(**inputs, **decoder, reference_inputs=prompts, lam=LAM).logits
    expected = two(LAM)(decoder["decoder_input_ids"]).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_a_cache_goes_on_with_both_prompts(models):
    """What is continued from a returned cache is what is decoded in one go; it is not another plan's."""
    _, _, model = models
    whole = by_one(model, SHORT, LONG)
    first = model.generate(
        **SHORT, reference_inputs=LONG, lam=LAM, **{**NEW, "max_new_tokens": 3}, return_dict_in_generate=True
    )
    new = first.sequences[:, 5:]

    def longer(each):
        return {
            "input_ids": torch.cat([each["input_ids"], new], dim=1),
            "attention_mask": torch.cat([each["attention_mask"], torch.ones_like(new)], dim=1),
        }

    rest = {**NEW, "max_new_tokens": 3, "past_key_values": first.past_key_values}
    assert model.generate(**longer(SHORT), reference_inputs=longer(LONG), lam=LAM, **rest).tolist() == whole
    with pytest.raises(DeRaError, match="past_key_values was filled"):
        model.generate(**longer(SHORT), reference_inputs=longer(LONG), lam=LAM[::-1], **rest)


def test_what_does_not_fit_is_refused_in_words(models):
    _, _, model = models
    ids = LONG["input_ids"]

    def error(reference_inputs=LONG, inputs=SHORT, **options) -> str:
        with pytest.raises(DeRaError) as caught:
            model.generate(**inputs, reference_inputs=reference_inputs, **{"lam": 0.5, **options})
        return str(caught.value)

    assert "tensors as a tokenizer gives" in error(ids)
    assert "reference_inputs['token_type_ids'] is not supported" in error({**LONG, "token_type_ids": ids})
    assert "for each of the 4 sequences" in error({"input_ids": ids[:1]})
    assert "give the mask" in error({"input_ids": ids})
    assert "the shape of the ids, [4, 11]" in error({"input_ids": ids, "attention_mask": ids[:, 1:]})
    assert "padded on the right" in error({name: value.flip(1) for name, value in LONG.items()})
    assert "no row for the token 9999" in error({**LONG, "input_ids": ids.clone().fill_(9999)})
    assert "position_ids does not go together with reference_inputs" in error(position_ids=SHORT["input_ids"])
    assert "inputs_embeds does not" in error(inputs={"inputs_embeds": torch.zeros(4, 5, 32)})
    assert "pixel_values does not" in error(pixel_values=torch.zeros(4, 3, 8, 8))
    assert "token_healing=True does not" in error(token_healing=True)
    assert "guidance_scale=3.0 and lam" in error(None, guidance_scale=3.0)
    assert "guidance_scale=3.0 and reference_inputs" in error(lam=None, guidance_scale=3.0)
    assert "needs the guidance_scale" in error(None, lam=None, negative_prompt_ids=ids)
    assert "goes with one of True" in error(lam=model.plan(None, 4))
    assert "by_prompt=True; reference_inputs goes" in error(None, lam=model.plan(0.5, 4, by_prompt=True))
    assert "the batch needs [4, 1]" in error(lam=[0.5, 1.0])
    for call in (
        lambda: model(**SHORT, labels=SHORT["input_ids"], reference_inputs=LONG, lam=0.5),
        lambda: model(inputs_embeds=torch.zeros(4, 5, 32), reference_inputs=LONG, lam=0.5),
        lambda: model(**SHORT, past_key_values=StaticCache(model.config, 8), reference_inputs=LONG, lam=0.5),
    ):
        with pytest.raises(DeRaError, match="reference_inputs"):
            call()


def test_weights_can_not_be_mixed_by_prompt():
    peft_model = adapt(make_base(base_of("llama")), target_modules=["q_proj"])
    model = MixtureModel.from_peft(peft_model, mixing="weights")
    with pytest.raises(DeRaError, match="has one row a sequence, which can't have two prompts"):
        model.generate(**SHORT, reference_inputs=LONG, lam=0.5, **NEW)


class TwoPlausible(TwoPrompts):
    """λ=2 among the tokens that the aligned model gives a tenth of its best one's probability, or more."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mixed = super().forward(input_ids, attention_mask).logits
        p = last_logits(self.aligned, input_ids, torch.ones_like(input_ids)).softmax(-1)
        return CausalLMOutput(logits=mixed.masked_fill(p < 0.1 * p.amax(-1, keepdim=True), -torch.inf))


@torch.no_grad()
def test_rules_see_the_logits_of_both_prompts(models):
    reference, aligned, model = models
    inputs, prompts = {"input_ids": UNPADDED["input_ids"]}, ANOTHER
    for repeats, options in ((1, {}), (3, {"num_beams": 3}), (1, {"do_sample": True})):
        two = TwoPlausible(reference, aligned, 2.0, 7, repeated(prompts, repeats))
        torch.manual_seed(0)
        expected = two.generate(**inputs, **{**NEW, **options}, use_cache=False).tolist()
        assert by_one(model, inputs, prompts, 2.0, combine="plausible:0.1", **options) == expected
    assert expected != by_one(model, inputs, prompts, 2.0, do_sample=True)
