"""What ends a completion: the base's generation config, the adapter's tokenizer, and what its training wrote down."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import train, write_rows
from tiny_models import CORPUS, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from two_models import TwoModels, decode_by_hand, load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.batching import decode
from dera_peft.decoding.prompts import encode, from_texts
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.training.sft_model import find_sft_model

END, TURN = " the", " and"  # ordinary tokens of the tiny tokenizer's, which can be made to end a text


def names(tokenizer) -> dict[str, str]:
    return {text: tokenizer.tokenize(text)[0] for text in (END, TURN)}


def set_end(folder: Path, base: Path, token: str, **settings) -> int:
    """Gives a folder the base's tokenizer with another end token; returns its id."""
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token=token, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer.eos_token_id


@pytest.fixture
def adapter(tiny_adapter, tmp_path) -> Path:
    return shutil.copytree(tiny_adapter, tmp_path / "adapter")


def test_it_is_the_union_of_what_is_known(tiny_base, adapter, top_adapter, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    GenerationConfig(eos_token_id=[2, 9]).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    end, turn = (tokenizer.convert_tokens_to_ids(name) for name in names(tokenizer).values())
    source = ModelSource.read(base=base, adapter=adapter)
    assert source.end_tokens() == [2, 9]
    set_end(adapter, base, names(tokenizer)[END])
    assert source.end_tokens() == [end, 2, 9]
    branches = {"reference": ["sft"], "aligned": ["default"]}
    under = shutil.copytree(top_adapter, tmp_path / "sft")
    Record(str(base), {"default": str(under)}, {"reference": [], "aligned": ["default"]}).save(under)
    record = Record.load(under)
    replace(record, training={"end_tokens": [names(tokenizer)[TURN]]}).save(under)
    Record(str(base), {"sft": str(under), "default": str(adapter)}, branches).save(adapter)
    source = ModelSource.read(adapter=adapter)
    assert source.end_tokens() == [turn, end, 2, 9], "an adapter under it may have been trained to end otherwise"
    assert set(DeRaModel.from_source(source).generation_config.eos_token_id) == {turn, end, 2, 9}
    model = DeRaModel.from_pretrained(base, shutil.copytree(top_adapter, tmp_path / "plain"))
    assert model.generation_config.eos_token_id == [2, 9]
    model.add_adapter("other", under)
    assert model.generation_config.eos_token_id == [2, 9, turn]
    replace(record, training={"end_tokens": ["<|im_end|>"]}).save(under)
    with pytest.raises(DeRaError, match=r"dera.json names '<\|im_end\|>' as a token that ends .* does not have it"):
        ModelSource.read(adapter=adapter).end_tokens()


def test_an_adapters_end_token_ends_what_it_decodes(tiny_base, adapter):
    """The end token is the one that two whole models give as their third."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, padding_side="left")
    prompts = encode(from_texts(CORPUS[:4]), tokenizer, AutoModelForCausalLM.from_pretrained(tiny_base).config, 8)
    mixture = TwoModels(*load_two(tiny_base, adapter), lam=0.5)

    def by_hand(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        return decode_by_hand(mixture, ids, torch.ones_like(ids), 8)[0].tolist()

    expected = list(map(by_hand, prompts))
    index = next(i for i, tokens in enumerate(expected) if tokens[2] not in tokens[:2])
    end = expected[index][2]
    assert expected[index][3:], "it goes on by itself"
    assert set_end(adapter, tiny_base, tokenizer.convert_ids_to_tokens(end)) == end
    model = DeRaModel.from_pretrained(tiny_base, adapter)
    request = Request(index, 0.5)
    ((found,),) = decode(model, tokenizer, prompts, [request], Sampling(max_new_tokens=8, temperature=0.0), 1)
    assert (found.tokens, found.end_token_id, found.finish_reason) == (expected[index][:3], end, "eos")
    assert found.text == tokenizer.decode(expected[index][:2]), "without the end token, special or not"
    assert model.generate(torch.tensor([prompts[index]]), lam=0.5, max_new_tokens=8)[0, -1] == end


@pytest.fixture(scope="module")
def chat_base(tiny_base, tmp_path_factory) -> Path:
    """A base of whose tokens <|im_start|> and <|im_end|> are special, and whose end token is another one."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("chat") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["eos_token", "template"])
def test_training_writes_down_what_it_ended_with(form, chat_base, tmp_path):
    """`eos_token`, or a chat template that ends a turn with another token than the end token."""
    end = AutoTokenizer.from_pretrained(chat_base).convert_tokens_to_ids("<|im_end|>")
    assert end != 2
    if form == "eos_token":
        rows, settings = [{"text": text} for text in CORPUS[:8]], {"eos_token": "<|im_end|>", "merge_adapter": True}
    else:
        turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}]
        rows, settings = [{"messages": turns}] * 8, {}
    data = write_rows(tmp_path / "data.jsonl", rows)
    folder = train(
        "sft", tmp_path / "sft", model_name_or_path=chat_base, dataset_name=data, max_steps=1, use_peft=True,
        lora_target_modules=["q_proj", "v_proj"], **settings,
    )  # fmt: skip
    recorded = json.loads((folder / "dera.json").read_text())["training"]["end_tokens"]
    assert recorded == (["<|im_end|>"] if form == "eos_token" else ["</s>", "<|im_end|>"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()  # the record alone tells
    assert set(find_sft_model(str(folder)).load_to_sample().generation_config.eos_token_id) == {2, end}
    assert set(DeRaModel.from_pretrained(adapter=folder).generation_config.eos_token_id) == {2, end}
    if form == "eos_token":
        merged = GenerationConfig.from_pretrained(folder / "merged")
        assert set(merged.eos_token_id) == {2, end}, "for those who decode it elsewhere"


def test_a_copy_of_an_adapter_keeps_its_tokenizer(tiny_base, adapter, tmp_path):
    end = set_end(adapter, tiny_base, "<s>", chat_template="{{ 'mine' }}")
    model = DeRaModel.from_pretrained(tiny_base, adapter)
    model.save_pretrained(tmp_path / "saved")
    model.export(0.5, tmp_path / "exported")
    for copy in ({"adapter": tmp_path / "saved"}, {"base": tiny_base, "adapter": tmp_path / "exported"}):
        source = ModelSource.read(**copy)
        assert source.tokenizer().chat_template == "{{ 'mine' }}"
        assert set(source.end_tokens()) == {end, 2}


def test_none_is_needed_where_there_is_no_tokenizer(tiny_base, tiny_adapter, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    assert DeRaModel.from_pretrained(base, tiny_adapter).generation_config.eos_token_id == 2
    assert make_adapter(base, tmp_path / "adapter").is_dir()


def test_a_saved_model_keeps_the_end_tokens_of_its_adapters_records(tiny_base, tmp_path):
    """The records stand beside the adapters, and are not copied with them."""
    folders = {name: tmp_path / name for name in ("one", "two")}
    for (name, folder), end in zip(folders.items(), ("<pad>", "<s>"), strict=True):
        make_adapter(tiny_base, folder)
        branches = {"reference": [], "aligned": [name]}
        Record(str(tiny_base), {name: str(folder)}, branches, training={"end_tokens": [end]}).save(folder)
    model = DeRaModel.from_pretrained(tiny_base, adapters=folders)
    ends = set(model.base.generation_config.eos_token_id)
    assert {0, 1} < ends
    model.lam = {"one": 0.5, "two": 0.5}
    model.save_pretrained(tmp_path / "saved")
    again = DeRaModel.from_pretrained(tmp_path / "saved")
    assert set(again.base.generation_config.eos_token_id) == ends


def test_a_model_that_is_fine_tuned_as_a_whole_ends_as_its_template_does(tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<s>{% endfor %}"
    chatty = tmp_path / "chatty"
    shutil.copytree(tiny_base, chatty)
    tokenizer.save_pretrained(chatty)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": CORPUS[0]}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat}] * 8)
    train("sft", tmp_path / "sft", model_name_or_path=chatty, dataset_name=rows, max_steps=1)
    saved = GenerationConfig.from_pretrained(tmp_path / "sft").eos_token_id
    assert set(saved) == {tokenizer.bos_token_id, tokenizer.eos_token_id}
