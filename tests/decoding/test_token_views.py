"""The texts of tokens, and what each branch would have said."""

import pytest
import torch
from tiny_models import make_tokenizer
from transformers import AutoTokenizer

from dera_peft.decoding.scoring import score
from dera_peft.decoding.token_views import token_texts, token_views

TEXT = " saw a 🎉 fête, Zoë مرحبا of the moon"


@pytest.fixture(scope="module", params=["bytes", "stories"])
def tokenizer(request):
    return (
        make_tokenizer()
        if request.param == "bytes"
        else AutoTokenizer.from_pretrained(request.getfixturevalue("stories"))
    )


def test_texts_of_tokens_make_up_the_text(tokenizer):
    prompt = tokenizer.encode("The old fox")
    completion = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    texts = token_texts(prompt, completion, tokenizer)
    assert len(texts) == len(completion)
    assert "".join(texts).strip() == TEXT.strip() + "</s>"
    party = texts.index("🎉")
    assert texts[party - 3 : party] == ["", "", ""], "its four bytes are four tokens, the last of which has it"
    assert texts[-1] == "</s>"


def test_a_character_that_is_cut_off_is_told(tokenizer):
    party = [*tokenizer.encode("🎉", add_special_tokens=False)][-4:]
    texts = token_texts(tokenizer.encode("a"), [*party[:2], *party[:2]], tokenizer)
    assert "".join(texts).replace("\N{REPLACEMENT CHARACTER}", "") == ""
    assert "\N{REPLACEMENT CHARACTER}" in texts[-1]
    assert token_texts([], [], tokenizer) == []


@torch.no_grad()
def test_views_are_the_branches_own_best_tokens(tiny_model, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompt = tokenizer.encode("A fox crossed the")
    completion = tokenizer.encode(" frozen river at", add_special_tokens=False)
    (scored,) = score(tiny_model, [prompt], [completion], 0.5, top=3)
    made = token_views(scored, prompt, completion, tokenizer)
    branches = tiny_model(torch.tensor([prompt + completion]), lam=0.5, output_branches=True).branch_logits
    chances = {name: logits[0, len(prompt) - 1 : -1].softmax(-1) for name, logits in branches.items()}
    mean = (chances["reference"] + chances["aligned"]) / 2
    js = sum((p * (p / mean).log()).sum(-1) / 2 for p in chances.values())
    assert js.max() > 0.05, "the branches differ"
    assert "".join(view["token"] for view in made) == " frozen river at"
    for place, view in enumerate(made):
        assert view.keys() == {"token", "js", "reference", "aligned"}
        assert view["js"] == pytest.approx(js[place].item(), abs=1e-5)
        for name, p in chances.items():
            best = p[place].topk(3)
            assert [chance for _, chance in view[name]] == pytest.approx(best.values.tolist(), abs=1e-5)
            said = tokenizer.decode(best.indices[:1])
            assert view[name][0][0] == said or "\N{REPLACEMENT CHARACTER}" in said
