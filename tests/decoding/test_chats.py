"""Chats in the forms that data sets have them, and the tokens that a template makes of them, written out by hand."""

import json

import pytest
from datasets import Dataset, Features, Json
from tiny_models import make_tokenizer
from transformers import LlamaConfig

from dera_peft import DeRaError
from dera_peft.decoding.chats import ChatError, read_content, with_answer
from dera_peft.decoding.prompts import encode, from_texts, read_prompts

USER = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "Sure,"}
TEMPLATE = (
    "{{ bos_token }}{% if tools is not none and tools is defined %}TOOLS {{ tools | length }}{{ tools[0]['name'] }}\n"
    "{% endif %}{% if mood is defined %}MOOD {{ mood }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    fast = make_tokenizer()
    fast.chat_template = TEMPLATE
    return fast


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi", "Hi"),
        ([USER], [USER]),
        (USER, [USER]),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Sure,"}], [USER, BEGUN]),
        ([{"role": "Human", "content": "Hi"}], [USER]),
        ([{"role": "user", "content": "Hi", "from": None, "value": None, "name": None}], [USER]),
        ([{"role": "user", "content": [{"type": "text", "text": "H", "image": None}, "i"]}], [USER]),
        ([{"role": "ipython", "content": "Hi", "id": 3}], [{"role": "ipython", "content": "Hi", "id": 3}]),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
        ),
    ],
    ids=["text", "chat", "message", "sharegpt", "role", "nulls", "parts", "unknown", "calls"],
)
def test_what_is_read_as_a_chat(value, expected):
    assert read_content(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        3, None, [], ["Hi"], [{"role": "user"}], [{"content": "Hi"}], [{"role": 1, "content": "Hi"}],
        [{"role": "user", "content": 3}], [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
    ],
)  # fmt: skip
def test_what_is_no_chat(value):
    with pytest.raises(ChatError, match=r"^a prompt must (be a text or a list of chat messages|consist of texts)"):
        read_content(value)


ROWS = [
    ({"prompt": [USER]}, "<s>user: Hi</s>\nassistant:"),
    ({"prompt": [USER, BEGUN]}, "<s>user: Hi</s>\nassistant: Sure,"),
    ({"prompt": "Hi", "system": "Be kind."}, "<s>system: Be kind.</s>\nuser: Hi</s>\nassistant:"),
    (
        {"prompt": [{"role": "system", "content": "Be brief."}, USER], "system": "Be kind."},
        "<s>system: Be brief.</s>\nuser: Hi</s>\nassistant:",
    ),
    ({"prompt": [USER], "tools": [{"name": "f"}]}, "<s>TOOLS 1f\nuser: Hi</s>\nassistant:"),
    ({"prompt": [USER], "tools": '[{"name": "f"}]'}, "<s>TOOLS 1f\nuser: Hi</s>\nassistant:"),
    ({"prompt": [USER], "tools": []}, "<s>user: Hi</s>\nassistant:"),
    (
        {"prompt": [USER, BEGUN], "chat_template_kwargs": {"mood": "gay"}},
        "<s>MOOD gay\nuser: Hi</s>\nassistant: Sure,",
    ),
]


def test_a_row_is_rendered_alike_from_a_file_and_from_a_dataset(tmp_path, tokenizer):
    """With its tools, its arguments for the template, its system column, and the answer that it begins."""
    rows, expected = [row for row, _ in ROWS], [text for _, text in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = dict.fromkeys(("prompt", "system", "tools", "chat_template_kwargs"), Json())
    whole = [{name: row.get(name) for name in columns} for row in rows]
    Dataset.from_list(whole, features=Features(columns)).save_to_disk(tmp_path / "rows")
    for name in ("rows.jsonl", "rows"):
        prompts = read_prompts(str(tmp_path / name))
        ids = encode(prompts, tokenizer, LlamaConfig(), 8, chat=True)
        assert [tokenizer.decode(each) for each in ids] == expected


def test_before_a_text_the_system_column_is_a_text(tokenizer):
    (ids,) = encode(read_prompts([{"prompt": "Hi", "system": "Be kind."}]), tokenizer, LlamaConfig(), 8)
    assert tokenizer.decode(ids) == "Be kind.\n\nHi"


def test_of_a_whole_chat_the_prompt_stands_before_the_last_answer(tmp_path):
    """In a column of another name than prompt, from files and datasets alike."""
    rows = [{"messages": [USER, BEGUN], "prompt": "x"}, {"messages": [USER], "prompt": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    for name in ("rows.jsonl", "rows"):
        assert [each.content for each in read_prompts(str(tmp_path / name), "messages")] == [[USER], [USER]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER], "tools": "[f"}, "prompts, prompt 1: 'tools' or 'chat_template_kwargs' is not valid JSON"),
        ({"prompt": [USER], "tools": {"name": "f"}}, "prompts, prompt 1: 'tools' must be a list"),
        ({"prompt": [USER], "chat_template_kwargs": [1]}, "prompts, prompt 1: 'chat_template_kwargs' must be names wi"),
        ({"prompt": [USER], "tools": [3]}, "prompts, prompt 1: the chat template refuses this chat: "),
        ({"prompt": [{"role": "user"}]}, "prompts, prompt 1: a prompt must be a text or a list of chat messages"),
    ],
)
def test_what_cannot_be_rendered_is_told_with_its_row(row, message, tokenizer):
    with pytest.raises(DeRaError, match=message):
        encode(read_prompts([row]), tokenizer, LlamaConfig(), 8, chat=True)


def test_a_tokenizer_with_several_templates(tokenizer):
    """The one for tools where there are tools, else the default; without a default it is an error in words."""
    fast = make_tokenizer()
    fast.chat_template = {"default": "D {{ messages[0]['content'] }}", "tool_use": "T {{ messages[0]['content'] }}"}
    prompts = read_prompts([{"prompt": [USER]}, {"prompt": [USER], "tools": [{"name": "f"}]}])
    ids = encode(prompts, fast, LlamaConfig(), 8, chat=True)
    assert [fast.decode(each) for each in ids] == ["D Hi", "T Hi"]
    fast.chat_template = {"rag": "R"}
    with pytest.raises(DeRaError, match=r"--prompt 1: the chat template refuses this chat: .*no default"):
        encode(from_texts(["Hi"]), fast, LlamaConfig(), 8, chat=True)


def test_an_answer_continues_the_one_that_is_begun():
    assert with_answer([USER, BEGUN], " Ann") == [USER, {"role": "assistant", "content": "Sure, Ann"}]
    assert with_answer("Hi", "Ann") == [USER, {"role": "assistant", "content": "Ann"}]
