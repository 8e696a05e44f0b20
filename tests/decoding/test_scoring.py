"""Scores of given completions against two whole models, each sequence by itself, in fp64."""

import copy

import pytest
import torch
from compatibility import BASES, ENCODER_DECODERS
from tiny_bases import adapt, make_base
from tiny_models import make_adapter
from two_models import load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.decoding import scoring
from dera_peft.decoding.scoring import score

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46], [8], [8], [30, 31]]
COMPLETIONS = [[20, 21, 22, 23], [60], [], [70, 71], [4, 5, 6, 7, 8, 9, 10]]
LAM = [0.5, 0.0, 1.0, 1.5, -0.5]


@torch.no_grad()
def by_hand(models, prompt, completion) -> list[torch.Tensor]:
    """Each model's logits at the completion's places, `[T, V]` fp64."""
    ids = torch.tensor([[*prompt, *completion]])
    return [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in models]


def expected_log_p(z, completion, temperature=1.0) -> torch.Tensor:
    return (z / temperature).log_softmax(-1)[range(len(completion)), completion]


def expected_kl(z, z_ref) -> torch.Tensor:
    p, q = z.softmax(-1), z_ref.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def two(tiny_base, tiny_adapter):
    return load_two(tiny_base, tiny_adapter)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_sequence_by_itself(two, tiny_model, temperature, monkeypatch):
    whole = score(tiny_model, PROMPTS, COMPLETIONS, LAM, temperature, top=3)
    passes = []
    tiny_model.base.register_forward_hook(lambda *_: passes.append(1))
    together = score(tiny_model, PROMPTS, COMPLETIONS, LAM, temperature, top=3)
    assert len(passes) == 1, "all λ of all sequences from one pass"
    monkeypatch.setattr(scoring.Room, "of", lambda model: scoring.Room(tokens=1))
    one_by_one = score(tiny_model, PROMPTS, COMPLETIONS, LAM, temperature, top=3)
    assert len(passes) == 5, "one a sequence, and none for the empty completion"
    for found in (whole, together, one_by_one):
        for scored, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
            z_ref, z_aligned = by_hand(two, prompt, completion)
            assert scored.log_p.shape == scored.kl.shape == (len(LAM), len(completion))
            for row, lam in enumerate(LAM):
                z = (1 - lam) * z_ref + lam * z_aligned
                close(scored.log_p[row], expected_log_p(z, completion, temperature))
                close(scored.log_p_at_1[row], expected_log_p(z, completion))
                close(scored.kl[row], expected_kl(z, z_ref))
            assert scored.kl[1].tolist() == [0.0] * len(completion), "at λ=0 it is nothing, without rounding"
            mean = (z_ref.softmax(-1) + z_aligned.softmax(-1)) / 2
            close(scored.disagreement, (expected_kl(z_ref, mean.log()) + expected_kl(z_aligned, mean.log())) / 2)
            for name, z in (("reference", z_ref), ("aligned", z_aligned)):
                p, ids = z.softmax(-1).topk(3)
                assert scored.best[name][0].tolist() == ids.tolist()
                close(scored.best[name][1], p)
        assert found[0].kl[2].min() > 0.01, "the branches must differ for a comparison to mean something"


@pytest.mark.parametrize("mixing", ["logits", "weights"])
def test_a_prompt_is_computed_once_for_all_of_its_completions(tiny_base, top_adapter, mixing, monkeypatch):
    model = DeRaModel.from_pretrained(tiny_base, top_adapter, mixing=mixing)
    tokens = []
    model.base.model.layers[-1].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    prompts = [PROMPTS[index % 3] for index in range(12)]
    completions = [COMPLETIONS[(0, 1, 3, 4)[index // 3]] for index in range(12)]
    shared = score(model, prompts, completions, LAM, top=2)
    computed_when_shared = sum(tokens)
    monkeypatch.setattr(scoring, "can_be_shared", lambda model: False)
    tokens.clear()
    alone = score(model, prompts, completions, LAM, top=2)
    assert computed_when_shared < 0.85 * sum(tokens)
    for one, other in zip(shared, alone, strict=True):
        close(one.log_p, other.log_p.double())
        close(one.kl, other.kl.double())
    assert shared[0].log_p.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "mpt", "deepseek_v3"])
def test_prompts_of_different_lengths_are_shared(kind):
    """
    With rotary, absolute and counted positions, ALiBi, and latent attention; against two whole models. The longest
    prompt beside the longest completion would be more than the 128 positions there are, and so is in a pass of its own.
    """
    base = next(base for base in BASES if base.model_type == kind)
    reference = make_base(base)
    peft_model = adapt(copy.deepcopy(reference), target_modules=base.targets, layers_to_transform=[2, 3])
    models = (reference, copy.deepcopy(peft_model).merge_and_unload().eval())
    model = DeRaModel.from_peft(peft_model)
    prompts = [[*range(3, 118)], [9, 10, 3], [12], [9, 10, 3, 8], [5, 6, 7, 8, 9, 10, 11]] * 2
    completions = [[20, 21, 22], [*range(40, 70)], [30, 31], [], [60], [25], [4, 5], [61, 62, 63], [7, 8, 9], [33] * 12]
    passes = []
    model.base.register_forward_hook(lambda *_: passes.append(1))
    found = score(model, prompts, completions, LAM)
    assert len(passes) == 4, "twice: one for the prompts, and one for what follows them"
    for scored, prompt, completion in zip(found, prompts, completions, strict=True):
        z_ref, z_aligned = by_hand(models, prompt, completion)
        for row, lam in enumerate(LAM):
            z = (1 - lam) * z_ref + lam * z_aligned
            close(scored.log_p[row], expected_log_p(z, completion))
            close(scored.kl[row], expected_kl(z, z_ref))
    assert found[0].kl[2].min() > 0.01


def test_a_completion_that_is_scored_alone_shares_nothing(tiny_base, tiny_adapter, monkeypatch):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    passes = []
    model.base.model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    monkeypatch.setattr(scoring.Room, "of", lambda model: scoring.Room(logits=1))
    score(model, [PROMPTS[0]] * 3, COMPLETIONS[:1] * 3, LAM)
    assert passes == [len(PROMPTS[0]) + len(COMPLETIONS[0]) - 1] * 3


def test_totals(two, tiny_model):
    whole, _, empty, *_ = score(tiny_model, PROMPTS, COMPLETIONS, 0.5)
    z_ref, z_aligned = by_hand(two, PROMPTS[0], COMPLETIONS[0])
    log_p = expected_log_p(0.5 * z_ref + 0.5 * z_aligned, COMPLETIONS[0])
    close(whole.total, log_p.sum()[None])
    close(whole.per_token, log_p.mean()[None])
    close(whole.perplexity.log(), -log_p.mean()[None])
    assert empty.total.tolist() == [0.0]
    assert empty.per_token.isnan().all()
    assert empty.perplexity.isnan().all()
    assert whole.best == {}


def test_too_little_memory_halves_the_slice_and_says_so(tiny_model, monkeypatch, caplog):
    expected, real, sizes = score(tiny_model, PROMPTS, COMPLETIONS, LAM), scoring._score_slice, []

    def short_of_memory(model, prompts, *args):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(prompts))
        return real(model, prompts, *args)

    monkeypatch.setattr(scoring, "_score_slice", short_of_memory)
    monkeypatch.setattr(scoring.Room, "of", lambda model: scoring.Room(tokens=128))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    for scored, same in zip(score(tiny_model, PROMPTS, COMPLETIONS, LAM), expected, strict=True):
        close(scored.log_p, same.log_p.double())
    assert sum(sizes) == len(PROMPTS)
    assert "out of memory for 5 sequences: going on with half as many" in caplog.text
    monkeypatch.setattr(scoring, "_score_slice", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(DeRaError, match="out of memory for a single sequence of 1 tokens"):
        score(tiny_model, PROMPTS, COMPLETIONS, LAM)


def test_mixed_weights(two, tiny_base, tiny_adapter):
    """At λ=1 they are the aligned model's; between, those of PEFT's own adapter with its scale multiplied."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference, aligned = two
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), tiny_adapter
    )
    for module in peft_model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    half = peft_model.merge_and_unload().eval()
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights")
    for scored, prompt, completion in zip(
        score(model, PROMPTS, COMPLETIONS, [0.5, 1, 0], 0.8, top=2), PROMPTS, COMPLETIONS, strict=True
    ):
        z_ref, z_aligned, z_half = by_hand((reference, aligned, half), prompt, completion)
        for row, z in enumerate((z_half, z_aligned, z_ref)):
            close(scored.log_p[row], expected_log_p(z, completion, 0.8))
            close(scored.kl[row], expected_kl(z, z_ref))
        assert scored.disagreement is None
        assert scored.best == {}


def test_several_adapters(two, tiny_base, tiny_adapter, tmp_path):
    other = make_adapter(tiny_base, tmp_path / "other", seed=5)
    models = (*two, load_two(tiny_base, other)[1])
    model = DeRaModel.from_pretrained(tiny_base, adapters={"one": str(tiny_adapter), "two": str(other)})
    lam = {"one": [0.5, 0.0], "two": [0.25, 0.0]}
    found = score(model, PROMPTS, COMPLETIONS, lam)
    for scored, same, prompt, completion in zip(
        found, score(model, PROMPTS, COMPLETIONS, torch.tensor([[0.5, 0.25]])), PROMPTS, COMPLETIONS, strict=True
    ):
        z = by_hand(models, prompt, completion)
        mixed = 0.25 * z[0] + 0.5 * z[1] + 0.25 * z[2]
        for row in (scored.log_p[0], same.log_p[0]):
            close(row, expected_log_p(mixed, completion))
        close(scored.kl[0], expected_kl(mixed, z[0]))
        mean = torch.stack([each.softmax(-1) for each in z]).mean(0)
        close(scored.disagreement, torch.stack([expected_kl(each, mean.log()) for each in z]).mean(0))
    with pytest.raises(DeRaError, match="pass a dict by name"):
        score(model, PROMPTS, COMPLETIONS, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("base", ENCODER_DECODERS, ids=lambda base: base.model_type)
def test_encoder_decoders(base):
    reference = make_base(base)
    peft_model = adapt(copy.deepcopy(reference), target_modules=base.targets, task_type="SEQ_2_SEQ_LM")
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    start = reference.generation_config.decoder_start_token_id
    found = score(DeRaModel.from_peft(peft_model), PROMPTS, COMPLETIONS, LAM)
    for scored, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
        if completion:
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *completion]])}
            z_ref, z_aligned = (model(**inputs).logits[0, :-1].double() for model in (reference, aligned))
            for row, lam in enumerate(LAM):
                z = (1 - lam) * z_ref + lam * z_aligned
                close(scored.log_p[row], expected_log_p(z, completion))
                close(scored.kl[row], expected_kl(z, z_ref))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[5]]}, "1 prompts and 5 completions"),
        ({"prompts": [[5], [], [6], [7], [8]]}, r"prompts\[1\] is empty"),
        ({"lam": []}, r"lam=\[\] is empty"),
        ({"lam": "much"}, "lam must be a number"),
        ({"temperature": 0}, "greedy decoding has no probabilities"),
        ({"top": 321}, "from 0 to the vocabulary's 320 tokens"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input(tiny_model, change, message):
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS, "lam": LAM, **change}
    with pytest.raises(DeRaError, match=message):
        score(tiny_model, **arguments)
