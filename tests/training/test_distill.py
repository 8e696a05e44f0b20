"""Distillation: the teacher is DeRa, over the student's own base; what is told of the KL is that of the files."""

import json
import random

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import train, words, write_rows
from test_faults import kill_at_step, train_and_be_killed
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_models import TwoModels, load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.prompts import Prompt
from dera_peft.training.distillation import STUDENT, Teacher, add_student, load_teacher
from dera_peft.training.prompt_rows import OTHER_TOKENS, TOO_LONG, read_prompt_rows

LAM = 1.5
IDS = torch.arange(3, 27).view(2, 12)
SETTINGS = {
    "lam": LAM, "max_length": None, "max_completion_length": 16, "beta": 0.0, "learning_rate": 3e-4, "max_steps": 6,
    "per_device_train_batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rng = random.Random(3)
    rows = [{"prompt": words(rng, 4)} for _ in range(40)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def distill(folder, prompts, **settings):
    return train("distill", folder, **{**SETTINGS, "prompts": prompts, **settings})


@torch.no_grad()
def test_the_teacher_is_dera_and_leaves_the_student_as_it_was(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", lora_dropout=0.5)
    model, branches = load_teacher(ModelSource(base=str(tiny_base), adapter=str(adapter)))
    teacher = Teacher(model, branches, LAM)
    add_student(model, branches, LAM)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    before = model(IDS, attention_mask=mask).logits
    model.train()
    teacher.eval()  # as TRL does it
    states = teacher.base_model(input_ids=IDS, attention_mask=mask, use_cache=False).last_hidden_state
    found = teacher.get_output_embeddings()(states)
    assert all(module.training for module in model.modules())
    reference, aligned = load_two(tiny_base, adapter)
    expected = TwoModels(reference, aligned, LAM)(IDS, attention_mask=mask).logits
    assert (expected - aligned(IDS, attention_mask=mask).logits)[mask.bool()].abs().max() > 0.5
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=1e-5)
    kept = teacher.base_model(input_ids=IDS, attention_mask=mask, logits_to_keep=3).last_hidden_state
    torch.testing.assert_close(kept, states[:, -3:])
    assert torch.equal(model.eval()(IDS, attention_mask=mask).logits, before)
    assert list(teacher.parameters()) == [], "the base is in memory once"
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {STUDENT}


@torch.no_grad()
def kl_by_hand(mixture, students, prompts) -> list[float]:
    """Mean KL(mixture ‖ student) for each, on the mixture's own greedy continuations of 32 tokens."""
    found = [[] for _ in students]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = mixture.generate(ids, max_new_tokens=32, do_sample=False, use_cache=False)
        log_p = mixture(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for student, values in zip(students, found, strict=True):
            log_q = student(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return [torch.cat(values).mean().item() for values in found]


def plain(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_a_distilled_adapter_is_nearer_to_dera_than_the_scaled_one(
    tiny_base, sft_adapter, merged, prompts, tmp_path, capfd
):
    """Over an SFT adapter, which is the reference of teacher and student."""
    adapter = make_adapter(tiny_base, tmp_path / "adapter", seed=4, scale=0.3)
    before = {file: file.read_bytes() for folder in (tiny_base, sft_adapter, adapter) for file in folder.iterdir()}
    names = {"base": tiny_base, "adapter": adapter, "reference": sft_adapter, "held_out": 2}
    names |= {"max_steps": 20, "learning_rate": 5e-4}
    folder = distill(tmp_path / "out", prompts, **names)
    assert all(file.read_bytes() == content for file, content in before.items())

    source = ModelSource(base=str(tiny_base), adapter=str(adapter), reference=(str(sft_adapter),))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    held_out = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()[-2:]]
    tokens = [tokenizer(text).input_ids for text in held_out]
    DeRaModel.from_source(source).export(LAM, tmp_path / "scaled")
    sft, distilled = AutoModelForCausalLM.from_pretrained(merged).eval(), plain(tiny_base, folder)
    mixture = TwoModels(sft, plain(merged, adapter), LAM)
    training = json.loads((folder / "dera.json").read_text())["training"]
    expected = kl_by_hand(mixture, [plain(tiny_base, tmp_path / "scaled"), distilled], tokens)
    found = [training["kl"][name] for name in ("scaled", "distilled")]
    assert [fit["kl"] for fit in found] == pytest.approx(expected, rel=1e-2)
    assert [fit["prompts"] for fit in found] == [2, 2]
    assert expected[1] < 0.85 * expected[0]
    assert (training["method"], training["lambda"], training["rows"]) == ("distill", LAM, {"total": 38})
    assert f"{training['kl']['distilled']['kl']:.4g} nats a token" in (folder / "README.md").read_text()

    # the record: at λ=0 the teacher's reference, at λ=1 PEFT's own loading of the folder
    model = DeRaModel.from_pretrained(adapter=folder)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, lam=1.0).logits, distilled(IDS).logits, atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(model(IDS, lam=0.0).logits, sft(IDS).logits, atol=2e-4, rtol=1e-5)
        assert (sft(IDS).logits - distilled(IDS).logits).abs().max() > 0.5
    capfd.readouterr()
    distill(folder, prompts, **names)
    assert "is complete: reusing it" in capfd.readouterr().err


def test_a_killed_run_goes_on(tiny_base, tiny_adapter, prompts, tmp_path):
    settings = {"base": tiny_base, "adapter": tiny_adapter, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = distill(tmp_path / "whole", prompts, **settings)
    train_and_be_killed(kill_at_step(3), "distill", tmp_path / "killed", **{**SETTINGS, "prompts": prompts, **settings})
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    killed = distill(tmp_path / "killed", prompts, **settings)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
    kl = [json.loads((folder / "dera.json").read_text())["training"]["kl"] for folder in (whole, killed)]
    assert kl[0]["scaled"] == kl[1]["scaled"], "it is told of where the student began, not of the checkpoint"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.0}, "lam=1 is the adapter as it is: there is nothing to distil"),
        ({"lam": None}, r"adapter, lam \(--lambda\) and prompts must be set"),
        ({"teacher_model_name_or_path": "other"}, "teacher_model_name_or_path='other' has no effect"),
        ({"adapter": "DORA"}, "DoRA"),
        ({"adapter": "HEAD"}, "LM head is adapted"),
        ({"held_out_prompts": "nowhere.jsonl"}, "there is no such file"),
    ],
)
def test_what_cant_be_distilled_is_refused(settings, message, tiny_base, tiny_adapter, prompts, tmp_path):
    kinds = {"DORA": {"use_dora": True}, "HEAD": {"target_modules": ["q_proj", "lm_head"]}}
    settings = {"base": tiny_base, "adapter": tiny_adapter, **settings}
    if settings["adapter"] in kinds:
        settings["adapter"] = make_adapter(tiny_base, tmp_path / "adapter", **kinds[settings["adapter"]])
    with pytest.raises(DeRaError, match=message):
        distill(tmp_path / "out", prompts, **settings)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_prompts_are_the_tokens_that_decoding_makes_of_them(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = AutoModelForCausalLM.from_pretrained(tiny_base).config
    chat = [{"role": "user", "content": "A fox"}]
    begun = [*chat, {"role": "assistant", "content": "crossed"}]
    prompts = [Prompt(index, content, "here") for index, content in enumerate([chat, begun, "moon " * 240, "A fox"])]
    rows, tokens, count = read_prompt_rows("prompts", prompts, tokenizer, config, 16, chat=True)
    assert rows == [{"prompt": chat}, {"prompt": chat}]
    assert tokens[0] == tokenizer("<s>user: A fox\nassistant:").input_ids
    assert count.unusable == {OTHER_TOKENS: 1, TOO_LONG: 1}
