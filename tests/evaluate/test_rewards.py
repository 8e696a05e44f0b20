"""Rewards from a user's file, and from a reward model."""

from pathlib import Path

import pytest
import torch
from conftest import make_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from dera_peft import DeRaError
from dera_peft.evaluate.rewards import load_reward, reward_fingerprint, score

FILE = """
def length(prompts, completions, **columns):
    return [len(completion) for completion in completions]

def weighted(prompts, completions, weight, **columns):
    return [w * len(c) for w, c in zip(weight, completions)]

def broken(prompts, completions, **columns):
    raise KeyError("oops")

def short(prompts, completions, **columns):
    return [0.0]

def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def nothing(prompts, completions, **columns):
    pass

def tensor(prompts, completions, **columns):
    import torch
    return torch.zeros(len(completions))

def huge(prompts, completions, **columns):
    return [10**400] * len(completions)

number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(FILE)
    return tmp_path / "rewards.py"


def test_rewards_and_columns(file):
    assert score(load_reward(f"{file}:length"), ["a", "b"], ["xy", "xyz"]) == [2.0, 3.0]
    assert score(load_reward(f"{file}:weighted"), ["a", "b"], ["xy", "xyz"], {"weight": [10, 100]}) == [20.0, 300.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' raised KeyError"),
        ("short", "'short' gave 1 values for 2"),
        ("nan", "'nan' gave nan for the completion 'xy'"),
        ("nothing", "'nothing' returned a NoneType: it must return a list of numbers"),
        ("tensor", "'tensor' returned a Tensor: it must return a list of numbers"),
        ("huge", "'huge' gave 1000.*: it must be a finite number"),
        ("weighted", "missing 1 required"),
    ],
)
def test_a_reward_that_fails_is_named(file, name, message):
    with pytest.raises(DeRaError, match=message):
        score(load_reward(f"{file}:{name}"), ["a", "b"], ["xy", "xyz"])


def test_what_is_not_a_reward(file):
    with pytest.raises(DeRaError, match="not a function"):
        load_reward(f"{file}:number")
    with pytest.raises(DeRaError, match="has no 'lenght'"):
        load_reward(f"{file}:lenght")
    with pytest.raises(DeRaError, match="there is no file"):
        load_reward("nowhere.py:length")
    with pytest.raises(DeRaError, match="does not name a Python object"):
        load_reward("rewards.py:no name")
    with pytest.raises(DeRaError, match="reward='length' is neither a function"):
        load_reward("length")
    with pytest.raises(DeRaError, match="no such folder"):
        load_reward("./length")


PROMPTS = ["A fox crossed the river.", "Rain", "My sister repairs bicycles and"]
COMPLETIONS = [" Nobody saw it.", " fell on the market, so the baker sold his bread.", " wheels."]


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@torch.no_grad()
def reward_alone(folder: Path, ids: list[int]) -> float:
    """One text by itself, read off the head at its last token: no padding, no batch."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    hidden = model.model(torch.tensor([ids])).last_hidden_state
    return model.score(hidden[0, -1]).item()


def test_a_reward_model_reads_chats_by_its_template(tmp_path, tokenizer):
    folder = make_reward_model(tmp_path / "model", tokenizer)
    reward = load_reward(str(folder))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    found = score(reward, [*PROMPTS, chat], [*COMPLETIONS, " Hello."])
    texts = [f"<s>user: {p}\nassistant: {c}\n" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    texts.append("<s>system: Be brief.\nuser: Hi!\nassistant:  Hello.\n")
    expected = [reward_alone(folder, tokenizer(text)["input_ids"]) for text in texts]
    assert len({round(value, 3) for value in expected}) == 4
    assert found == pytest.approx(expected, abs=1e-5)
    reward.batch_size = 1
    assert score(reward, PROMPTS, COMPLETIONS) == pytest.approx(expected[:3], abs=1e-5)


def test_a_reward_model_without_a_template_reads_one_text(tmp_path, tokenizer):
    tokenizer.chat_template = None
    folder = make_reward_model(tmp_path / "model", tokenizer)
    reward = load_reward(str(folder))
    ids = [tokenizer(p + c)["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert score(reward, PROMPTS, COMPLETIONS) == pytest.approx([reward_alone(folder, row) for row in ids], abs=1e-5)
    with pytest.raises(DeRaError, match="has no chat template, and the prompts are chats"):
        score(reward, [[{"role": "user", "content": "Hi!"}]], [" Hello."])


def test_what_is_too_long_gets_no_reward(tmp_path, tokenizer, capsys):
    tokenizer.chat_template = None
    folder = make_reward_model(tmp_path / "model", tokenizer, context=16)
    reward = load_reward(str(folder))
    fits, long = "Rain" + " fell", "Rain" + " fell on the market" * 9
    assert len(tokenizer(fits)["input_ids"]) <= 16 < len(tokenizer(long)["input_ids"])
    values = score(reward, ["Rain"] * 2, [long[4:], fits[4:]], allow_none=True)
    assert values == [None, pytest.approx(reward_alone(folder, tokenizer(fits)["input_ids"]), abs=1e-5)]
    assert "1 of 2 completions get no reward" in capsys.readouterr().err
    with pytest.raises(DeRaError, match="gave None"):
        score(reward, ["Rain"] * 2, [long[4:], fits[4:]])


def test_what_is_not_a_reward_model(tmp_path, tokenizer, tiny_base):
    with pytest.raises(DeRaError, match="has 3 labels, and a reward model has one"):
        load_reward(str(make_reward_model(tmp_path / "three", tokenizer, labels=3)))
    # a language model's config may say one label, and still there is no head
    model = AutoModelForCausalLM.from_pretrained(tiny_base, num_labels=1)
    model.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(DeRaError, match=r"was not trained as a reward model: it has no 'score.weight'"):
        score(load_reward(str(tmp_path / "language")), PROMPTS, COMPLETIONS)


def test_fingerprints_of_rewards(file, tmp_path, tokenizer):
    before = reward_fingerprint(f"{file}:length")
    file.write_text(FILE + "\n")
    assert reward_fingerprint(f"{file}:length") != before
    one = reward_fingerprint(str(make_reward_model(tmp_path / "one", tokenizer)))
    assert one != reward_fingerprint(str(make_reward_model(tmp_path / "two", tokenizer, labels=2)))
    assert reward_fingerprint("some-org/reward-model") == "some-org/reward-model"
