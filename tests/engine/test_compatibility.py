"""Every base and every kind of adapter of `compatibility.py`, in fp32, against independent code."""

import contextlib
import copy
import inspect
import io
from pathlib import Path

import compatibility
import pytest
import torch
from compatibility import BASES, BIASES, COMMON, ENCODER_DECODERS, KINDS, LINEAR, REFUSED, VOCABULARY, Base
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer
from transformers.modeling_outputs import CausalLMOutput
from two_models import TwoModels, position_ids

from dera_peft import DeRaError, DeRaModel
from dera_peft.cli.info import describe_model
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.plan import BatchPlan, Branch
from dera_peft.engine.routing import Routing

LAM = [0.0, 0.5, 1.0, 1.5]
PADDING = [3, 0, 5, 2]
NEW = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def make_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def batch(device):
    return {name: value.to(device) for name, value in make_batch().items()}


@torch.no_grad()
@pytest.mark.parametrize("upper", [False, True], ids=["all layers", "upper half"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base.model_type} {base.note}".strip())
def test_base(base, upper, batch, device):
    reference = make_base(base)
    layers = {"layers_to_transform": [2, 3]} if upper else {}
    peft_model = adapt(copy.deepcopy(reference), target_modules=base.targets, **layers).to(device)
    reference.to(device)
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    inputs = dict(batch)
    if "position_ids" in inspect.signature(type(reference).forward).parameters:
        inputs["position_ids"] = position_ids(batch["attention_mask"])
    with peft_model.disable_adapter():
        z_off = peft_model(**inputs).logits
    model = DeRaModel.from_peft(peft_model)
    assert model.fork_layer == (2 if upper and base.forks_above_input else 0)

    weight = torch.tensor(LAM, device=device)[:, None, None]
    real = batch["attention_mask"].bool()
    z_ref, z_aligned = reference(**inputs).logits, aligned(**inputs).logits
    assert (z_ref.argmax(-1) != z_aligned.argmax(-1))[real].sum() >= 4, "the branches must write other texts"
    expected = (1 - weight) * z_ref + weight * z_aligned
    torch.testing.assert_close(model(**inputs, lam=LAM).logits[real], expected[real], atol=2e-4, rtol=1e-5)
    if device.type == "cpu":
        torch.testing.assert_close(z_off, z_ref, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**inputs, lam=0).logits, z_off)
    else:  # two calls of jamba's experts and states on a GPU differ in their last bits
        torch.testing.assert_close(z_off, z_ref, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, lam=0).logits, z_off, atol=1e-4, rtol=1e-5)

    mixture = TwoModels(reference, aligned, weight.repeat_interleave(4, dim=0))
    by_two = mixture.generate(**batch, **NEW, num_beams=4, use_cache=False)
    assert model.generate(**batch, **NEW, num_beams=4, lam=LAM).tolist() == by_two.tolist()


class TwoEncoderDecoders(TwoModels):
    """Two whole encoder-decoders, both run from the start for every token; `generate` extends the decoder's tokens."""

    def __init__(self, reference, aligned, lam, source: dict):
        super().__init__(reference, aligned, lam)
        self.config = copy.deepcopy(self.config)
        self.config.is_encoder_decoder = False
        self.source = source

    def forward(self, input_ids, **kwargs):
        inputs = {**self.source, "decoder_input_ids": input_ids, "use_cache": False}
        z_ref, z_aligned = self.reference(**inputs).logits, self.aligned(**inputs).logits
        return CausalLMOutput(logits=(1 - self.lam) * z_ref + self.lam * z_aligned)


@torch.no_grad()
@pytest.mark.parametrize("base", ENCODER_DECODERS, ids=lambda base: base.model_type)
def test_encoder_decoder(base, batch, tmp_path, device):
    reference = make_base(base).to(device)
    reference.save_pretrained(tmp_path / "base")
    peft_model = adapt(copy.deepcopy(reference), target_modules=base.targets, task_type="SEQ_2_SEQ_LM")
    peft_model.save_pretrained(tmp_path / "adapter")
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    source = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    start = torch.full((4, 1), reference.generation_config.decoder_start_token_id, device=device)

    def mixture(lam, repeat=1):
        weight = torch.tensor(lam, device=device).repeat_interleave(repeat)[:, None, None]
        expanded = {name: value.repeat_interleave(repeat, dim=0) for name, value in source.items()}
        return TwoEncoderDecoders(reference, aligned, weight, expanded)

    def by_two(lam, repeat=1, **kwargs):
        return mixture(lam, repeat).generate(start, **NEW, **kwargs).tolist()

    assert by_two([0.0] * 4) != by_two([1.0] * 4)
    labels = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(5)).to(device)
    decoder_input_ids = reference.prepare_decoder_input_ids_from_labels(labels)
    expected = mixture(LAM)(decoder_input_ids).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loaded = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter", device_map=str(device))
    for model in (DeRaModel.from_peft(peft_model), loaded):
        output = model(**source, labels=labels, lam=LAM)
        torch.testing.assert_close(output.logits, expected, atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(output.loss, loss, atol=2e-4, rtol=1e-5)
        assert output.encoder_last_hidden_state.shape[0] == 6
        model.generation_config = reference.generation_config
        assert model.generate(**source, lam=LAM, **NEW).tolist() == by_two(LAM)
        beams = model.generate(**source, lam=LAM, num_beams=4, **NEW)
        assert beams.tolist() == by_two(LAM, 4, num_beams=4)
        plain = model.generate(**source, lam=0.0, **NEW)
        assert plain.tolist() == reference.generate(**source, **NEW).tolist()


@torch.no_grad()
def test_an_encoder_decoder_behind_the_commands():
    """`dera generate`'s decoding, in batches of other lengths, and what `dera info` says."""
    base = next(base for base in ENCODER_DECODERS if base.model_type == "bart")  # its positions are absolute
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, task_type="SEQ_2_SEQ_LM"))
    model.generation_config.eos_token_id = 2
    prompts = [[5, 6, 7, 8, 2], [9, 2], [10, 11, 12, 2]]
    requests = [Request(index, lam) for index in range(3) for lam in (0.0, 0.5, 1.0)]
    sampling = Sampling(max_new_tokens=5, temperature=0)
    found = {
        completion.request: completion.tokens
        for completions in decode(model, make_tokenizer(), prompts, requests, sampling, batch_size=4)
        for completion in completions
    }
    for request in requests:
        ids = torch.tensor([prompts[request.index]])
        alone = model.generate(ids, lam=request.lam, max_new_tokens=5, do_sample=False, num_beams=1)[0, 1:].tolist()
        assert found[request] == alone
    assert len(set(map(str, found.values()))) > 3
    facts = describe_model(model)
    assert facts["layers"] == 2
    assert facts["cache_bytes_per_token"] == {"below_fork_per_sequence": 0, "above_fork_per_row": 2 * 2 * 32 * 4}


@torch.no_grad()
def test_info_of_a_base_with_a_recurrent_state():
    base = next(base for base in BASES if base.model_type == "lfm2")
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets))
    # two of the four layers are attention: keys and values of 2 heads by 8 numbers of 4 bytes
    assert describe_model(model)["cache_bytes_per_token"]["above_fork_per_row"] == 2 * 2 * 16 * 4


def test_rows_that_a_model_reorders_are_refused():
    """An expert's batch is some tokens of all rows: nothing tells which belong to which branch."""
    routing = Routing()
    routing.plan, routing.length = (
        BatchPlan((Branch("reference"), Branch("aligned", ("a",))), torch.full((2, 1), 0.5)),
        3,
    )
    assert routing.rows("layer", torch.zeros(4, 3, 8), slice(2, 4)) == slice(2, 4)
    assert routing.rows("layer", torch.zeros(12, 8), slice(2, 4)) == slice(6, 12)
    for tokens in (4, 5, 11):
        with pytest.raises(DeRaError, match=rf"experts.0.up_proj was called with {tokens} rows"):
            routing.rows("experts.0.up_proj", torch.zeros(tokens, 8), slice(2, 4))


def make_tiny(kind):
    """The base (or tied Llama) that a kind of adapter is for."""
    base = next(base for base in BASES if base.model_type == ("llama" if kind.base == "tied" else kind.base))
    if kind.base == "tied":
        base = Base("llama", LINEAR, {"tie_word_embeddings": True}, common=COMMON)
    return make_base(base)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_adapter(kind, batch, tmp_path, device):
    base = make_tiny(kind).to(device)
    base.save_pretrained(tmp_path / "base")
    peft_model = adapt(base, **{"target_modules": LINEAR, **kind.settings})
    peft_model.save_pretrained(tmp_path / "adapter")
    inputs = {**batch, "position_ids": position_ids(batch["attention_mask"])}
    z_aligned = peft_model(**inputs).logits
    with peft_model.disable_adapter():
        z_ref = peft_model(**inputs).logits
    real = batch["attention_mask"].bool()
    assert (z_ref - z_aligned)[real].abs().max() > 0.2, "the branches must differ"
    weight = torch.tensor(LAM, device=device)[:, None, None]
    expected = (1 - weight) * z_ref + weight * z_aligned
    loaded = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter", device_map=str(device))
    for model in (DeRaModel.from_peft(peft_model), loaded):
        torch.testing.assert_close(model(**inputs, lam=LAM).logits[real], expected[real], atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, lam=0).logits, z_ref, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, lam=1).logits, z_aligned, atol=1e-5, rtol=1e-5)
        new = model.generate(**batch, lam=LAM, **NEW)
        assert new.tolist() == model.generate(**batch, lam=LAM, use_cache=False, **NEW).tolist()
        if not kind.scales:
            model.unwrap()
            with pytest.raises(DeRaError, match="can't be scaled"):
                DeRaModel.from_peft(model.peft_model, mixing="weights")


@torch.no_grad()
@pytest.mark.parametrize("kind", BIASES, ids=lambda kind: kind.name)
def test_trained_biases(kind, tmp_path):
    """PEFT's own loading loses the base's biases, so the reference is a base of its own."""
    batch = make_batch()
    reference = make_tiny(kind)
    reference.save_pretrained(tmp_path / "base")
    trained = adapt(copy.deepcopy(reference), **kind.settings)
    torch.manual_seed(3)
    biases = {n: p for n, p in trained.named_parameters() if n.endswith(".bias") and p.requires_grad}
    for parameter in biases.values():
        parameter += 0.5 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "adapter")
    (tmp_path / "plain").mkdir()
    plain = {**kind.settings, "bias": "none", "use_dora": False}
    adapt(copy.deepcopy(reference), **plain).save_pretrained(tmp_path / "plain")

    aligned = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapter").eval()
    inputs = {**batch, "position_ids": position_ids(batch["attention_mask"])}
    real = batch["attention_mask"].bool()
    z_ref, z_aligned = reference(**inputs).logits, aligned(**inputs).logits
    with aligned.disable_adapter():
        assert (aligned(**inputs).logits - z_ref)[real].abs().max() > 0.2, "the biases must matter"
    weight = torch.tensor(LAM)[:, None, None]
    expected = (1 - weight) * z_ref + weight * z_aligned
    mixture = TwoModels(reference, aligned.get_base_model(), weight.repeat_interleave(4, dim=0))
    by_two = mixture.generate(**batch, **NEW, num_beams=4, use_cache=False).tolist()

    def check(model, **names):
        lam = {names["name"]: LAM} if names else LAM
        torch.testing.assert_close(model(**inputs, lam=lam).logits[real], expected[real], atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, lam=dict.fromkeys(lam, 0.0) if names else 0).logits, z_ref)
        assert model.generate(**batch, **NEW, num_beams=4, lam=lam).tolist() == by_two

    model = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter")
    has_lower = "layers_to_transform" in kind.settings
    assert model.fork_layer == (2 if has_lower else 0)
    assert model.joins_before_head == ("head's" not in kind.name and "DoRA" not in kind.name)
    check(model)
    model.save_pretrained(tmp_path / "saved")
    check(model)
    check(DeRaModel.from_pretrained(tmp_path / "saved"))

    # beside another adapter, in either order
    for first, second in (("adapter", "plain"), ("plain", "adapter")):
        two = DeRaModel.from_pretrained(tmp_path / "base", adapters={first: tmp_path / first})
        two.add_adapter(second, tmp_path / second)
        check(two, name="adapter")
        if second == "adapter":
            with pytest.raises(DeRaError, match="no second such adapter"):
                two.add_adapter("third", tmp_path / "adapter")
            two.remove_adapter("adapter")
            one = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "plain")
            assert torch.equal(two(**inputs, lam=LAM).logits, one(**inputs, lam=LAM).logits)

    # under another adapter, as the reference's
    aligned.load_adapter(tmp_path / "plain", "plain")
    aligned.base_model.set_adapter(["default", "plain"])
    expected_on_top = (1 - weight) * z_aligned + weight * aligned.eval()(**inputs).logits
    on_top = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "plain", reference=tmp_path / "adapter")
    torch.testing.assert_close(on_top(**inputs, lam=LAM).logits[real], expected_on_top[real], atol=2e-4, rtol=1e-5)

    if kind.scales:
        scaled = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter", mixing="weights")
        model.export(0.6, tmp_path / "exported")
        exported = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "exported").eval()
        z_scaled = exported(**inputs).logits
        torch.testing.assert_close(scaled(**inputs, lam=0.6).logits[real], z_scaled[real], atol=2e-4, rtol=1e-5)
        check(model)
    else:
        with pytest.raises(DeRaError, match="can't be scaled"):
            model.export(0.6, tmp_path / "exported")

    peft_model = model.unwrap()
    assert torch.equal(peft_model(**inputs).logits, z_aligned), "as PEFT's own loading leaves it"
    with pytest.raises(DeRaError, match="Load it from its folder"):
        DeRaModel.from_peft(peft_model)


@torch.no_grad()
def test_biases_that_do_not_fit(tmp_path):
    kind = next(kind for kind in BIASES if kind.base == "phi" and kind.settings["bias"] == "all")
    make_tiny(kind).save_pretrained(tmp_path / "base")
    adapt(make_tiny(kind), **kind.settings).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)

    def error(tensors: dict, **kwargs) -> str:
        save_file(tensors, file)
        with pytest.raises(DeRaError) as caught:
            DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter", **kwargs)
        return str(caught.value)

    key = "base_model.model.model.layers.1.mlp.fc1.bias"
    assert "incomplete: no bias of 'model.layers.1.mlp.fc1'" in error({k: v for k, v in tensors.items() if k != key})
    assert "no bias of 'model.layers.1.mlp.fc1' with shape [3]" in error({**tensors, key: torch.zeros(3)})
    other = {**tensors, "base_model.model.model.embed_tokens.bias": torch.zeros(3)}
    assert "no bias of 'model.embed_tokens'" in error(other)
    offloaded = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "offload"}
    assert "where layers are offloaded" in error(tensors, **offloaded)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    LoraConfig(target_modules=["q_proj", "fc2"]).save_pretrained(tmp_path / "adapter")
    assert "which is not a LoRA factor" in error(tensors)

    jamba = next(base for base in BASES if base.model_type == "jamba")
    make_base(jamba).save_pretrained(tmp_path / "base")
    adapt(make_base(jamba), target_modules=["q_proj"], bias="all").save_pretrained(tmp_path / "adapter")
    assert "conv1d', a Conv1d;" in error(load_file(file))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_refused(refused, tmp_path):
    make_tiny(KINDS[0]).save_pretrained(tmp_path / "base")
    refused.config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeRaError) as caught:
        DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter")
    assert refused.message in str(caught.value)


def test_the_table_is_current():
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        compatibility.main()
    file = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert file.read_text(encoding="utf-8") == text.getvalue(), (
        "run: python tests/compatibility.py > docs/compatibility.md"
    )
