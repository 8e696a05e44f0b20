"""Rows in the forms that data sets have them: what is trained on, by hand, and what is told of the others."""

import random
from contextlib import suppress
from datetime import datetime

import pytest
from datasets import Dataset, Features, Json
from small_runs import train, write_rows
from tiny_models import make_tokenizer
from transformers import AutoTokenizer, LlamaConfig

from dera_peft import DeRaError
from dera_peft.decoding.prompts import encode, read_prompts
from dera_peft.training import trainer as running
from dera_peft.training.preference_rows import PROMPT_IN_TEXTS, PROMPT_NOT_IN_CHATS, PreferenceReader
from dera_peft.training.rows import LEFT_OUT, UnusableError, read_rows
from dera_peft.training.sft_rows import SFTReader, columns_to_read
from dera_peft.training.tokenized_rows import SHORTER


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHATS = ([user("n")], [answer("geese")], [answer("boat")])
SYSTEM_CHATS = ([system("Be kind."), user("n")], [answer("geese")], [answer("boat")])
HH = "\n\nHuman: n\n\nAssistant:"
PREFERENCES = {
    "texts": ({"prompt": "n", "chosen": " geese", "rejected": " boat"}, ("n", " geese", " boat")),
    "chats": ({"prompt": [user("n")], "chosen": [answer("geese")], "rejected": [answer("boat")]}, CHATS),
    "text beside whole chats": (
        {"prompt": "n", "chosen": [user("n"), answer("geese")], "rejected": [user("n"), answer("boat")]}, CHATS,
    ),
    "text beside answers": ({"prompt": "n", "chosen": [answer("geese")], "rejected": [answer("boat")]}, CHATS),
    "chat beside whole chats": (
        {"prompt": [user("n")], "chosen": [user("n"), answer("geese")], "rejected": [user("n"), answer("boat")]}, CHATS,
    ),
    "system prompt beside whole chats": (
        {
            "prompt": [system("Be kind.")],
            "chosen": [user("n"), answer("geese")], "rejected": [user("n"), answer("boat")],
        },
        SYSTEM_CHATS,
    ),
    "chat with a system message beside whole chats without": (
        {
            "prompt": [system("Be kind."), user("n")],
            "chosen": [user("n"), answer("geese")], "rejected": [user("n"), answer("boat")],
        },
        SYSTEM_CHATS,
    ),
    "text beside whole chats that begin with a greeting": (
        {
            "prompt": "n",
            "chosen": [answer("Hi"), user("n"), answer("geese")], "rejected": [answer("Hi"), user("n"), answer("boat")],
        },
        ([answer("Hi"), user("n")], [answer("geese")], [answer("boat")]),
    ),
    "whole chats": ({"chosen": [user("n"), answer("geese")], "rejected": [user("n"), answer("boat")]}, CHATS),
    "whole chats of several turns": (
        {
            "chosen": [user("n"), answer("geese"), user("m"), answer("a")],
            "rejected": [user("n"), answer("geese"), user("m"), answer("b")],
        },
        ([user("n"), answer("geese"), user("m")], [answer("a")], [answer("b")]),
    ),
    "chat beside texts": ({"prompt": [user("n")], "chosen": "geese", "rejected": "boat"}, CHATS),
    "chat beside a text and a chat": (
        {"prompt": [user("n")], "chosen": "geese", "rejected": [user("n"), answer("boat")]}, CHATS,
    ),
    "sharegpt": (
        {
            "chosen": [{"from": "human", "value": "n"}, {"from": "gpt", "value": "geese"}],
            "rejected": [{"from": "human", "value": "n"}, {"from": "gpt", "value": "boat"}],
        },
        CHATS,
    ),
    "conversations beside messages": (
        {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "n"}],
            "chosen": {"from": "gpt", "value": "geese"}, "rejected": {"from": "gpt", "value": "boat"},
        },
        SYSTEM_CHATS,
    ),
    "parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "n"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "geese"}]}], "rejected": "boat",
        },
        CHATS,
    ),
    "question": ({"question": "n", "chosen": " geese", "rejected": " boat"}, ("n", " geese", " boat")),
    "question and system": (
        {"system": "Be kind.", "question": "n", "chosen": " geese", "rejected": " boat"},
        ("Be kind.\n\nn", " geese", " boat"),
    ),
    "question and no system": (
        {"system": "", "question": "n", "chosen": " geese", "rejected": " boat"}, ("n", " geese", " boat"),
    ),
    "question and system beside chats": (
        {"system": "Be kind.", "question": "n", "chosen": [answer("geese")], "rejected": [answer("boat")]},
        SYSTEM_CHATS,
    ),
    "instruction and input": (
        {"instruction": "n", "input": "m", "chosen": " geese", "rejected": " boat"}, ("n\nm", " geese", " boat"),
    ),
    "hh": ({"chosen": f"{HH} geese", "rejected": f"{HH} boat"}, (HH, " geese", " boat")),
    "hh, answers that begin alike": (
        {"chosen": f"{HH} The boat waits", "rejected": f"{HH} The boats"}, (HH, " The boat waits", " The boats"),
    ),
    "hh, one answer begins the other": (
        {"chosen": f"{HH} The boat", "rejected": f"{HH} The boat waits\n\nHuman: m\n\nAssistant: no"},
        (HH, " The boat", " The boat waits\n\nHuman: m\n\nAssistant: no"),
    ),
    "hh, several turns": (
        {"chosen": f"{HH} a{HH} geese", "rejected": f"{HH} a{HH} boat"}, (f"{HH} a{HH}", " geese", " boat"),
    ),
    "hh beside its prompt": (
        {"prompt": HH, "chosen": f"{HH} geese", "rejected": f"{HH} boat"}, (HH, " geese", " boat"),
    ),
    "an answer that is begun": (
        {"prompt": [user("n"), answer("The")], "chosen": [answer(" geese")], "rejected": [answer(" boat")]},
        ([user("n")], [answer("The geese")], [answer("The boat")]),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def read(row: dict, tokenizer):
    return PreferenceReader(tuple(row), tokenizer)(row)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name, tokenizer):
    row, expected = PREFERENCES[name]
    found = read(row, tokenizer)
    assert tuple(found.columns[column] for column in ("prompt", "chosen", "rejected")) == expected
    assert found.chat == isinstance(expected[0], list)
    assert found.remark is None


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "n", "chosen": None, "rejected": "a"}, "lack chosen", ""),
        ({"prompt": "n", "chosen": "", "rejected": "a"}, "are empty", ""),
        ({"prompt": "n", "chosen": [], "rejected": [answer("a")]}, "are empty", ""),
        ({"prompt": "n", "chosen": [answer(" ")], "rejected": [answer("a")]}, "are empty", ""),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "are empty", ""),
        ({"chosen": f"{HH}", "rejected": f"{HH} b"}, "are empty", ""),
        ({"prompt": "n", "chosen": "a", "rejected": "a"}, "have identical chosen and rejected", ""),
        ({"chosen": "The boat waits", "rejected": "The boats"}, "have no prompt", "neither in a column (prompt, "),
        ({"prompt": None, "chosen": [answer("a")], "rejected": [answer("b")]}, "have no prompt", ""),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "have no prompt", ""),
        ({"prompt": [answer("The")], "chosen": "a", "rejected": "b"}, "have no prompt", ""),
        ({"prompt": "n", "chosen": 3, "rejected": "b"}, "can't be read", "chosen must be a text or a list of chat"),
        ({"prompt": "n", "chosen": "a", "rejected": [{"role": "assistant"}]}, "can't be read", "rejected must be"),
        (
            {"chosen": [user("n"), answer("a")], "rejected": [user("m"), answer("b")]},
            "have chosen and rejected that answer different prompts", "",
        ),
        (
            {"prompt": [user("n")], "chosen": "a", "rejected": "b", "tools": "["},
            "can't be rendered", "'tools' or 'chat_template_kwargs' is not valid JSON",
        ),
    ],
)  # fmt: skip
def test_preferences_that_cannot_be_trained_on(row, reason, detail, tokenizer):
    with pytest.raises(UnusableError) as caught:
        read(row, tokenizer)
    assert caught.value.args[0] == reason
    assert detail in (*caught.value.args, "")[1]


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        ({"prompt": "n", "chosen": "n geese", "rejected": "n boat"}, PROMPT_IN_TEXTS),
        (
            {"prompt": "x", "chosen": [user("n"), answer("a")], "rejected": [user("n"), answer("b")]},
            PROMPT_NOT_IN_CHATS,
        ),
    ],
)
def test_what_may_be_meant_otherwise_is_told(row, remark, tokenizer):
    assert read(row, tokenizer).remark == remark


TEXT_ROWS = {
    "text": ({"text": "n"}, {"text": "n"}),
    "prompt and completion": ({"prompt": "n", "completion": "m"}, {"prompt": "n", "completion": "m"}),
    "prompt and messages": (
        {"prompt": "n", "messages": [user("n"), answer("m")]}, {"messages": [user("n"), answer("m")]},
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "n"}, {"from": "gpt", "value": "m"}], "system": "Be kind."},
        {"messages": [system("Be kind."), user("n"), answer("m")]},
    ),
    "text and answer": (
        {"prompt": "n", "completion": [answer("m")]}, {"prompt": [user("n")], "completion": [answer("m")]},
    ),
    "chat and text": (
        {"prompt": [user("n")], "completion": "m"}, {"prompt": [user("n")], "completion": [answer("m")]},
    ),
    "text and whole chat": (
        {"prompt": "n", "completion": [user("n"), answer("m")]}, {"prompt": [user("n")], "completion": [answer("m")]},
    ),
    "an answer that is begun": (
        {"prompt": [user("n"), answer("The")], "completion": " m"},
        {"prompt": [user("n")], "completion": [answer("The m")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_ROWS)
def test_rows_of_sft(name, tokenizer):
    row, expected = TEXT_ROWS[name]
    found = SFTReader(columns_to_read(tuple(row)), tokenizer, "</s>")(row)
    assert {column: found.columns[column] for column in expected} == expected
    assert found.remark is None
    if not found.chat:
        assert found.columns["num_tokens"] == len(tokenizer("".join(expected.values()) + "</s>")["input_ids"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "can't be read"),
        ({"text": [user("n")]}, "can't be read"),
        ({"messages": "n"}, "can't be read"),
        ({"messages": [user(" ")]}, "are empty"),
        ({"prompt": "n", "completion": {"role": "assistant"}}, "can't be read"),
        ({"prompt": None, "completion": "m"}, "lack prompt"),
    ],
)
def test_rows_that_sft_cannot_learn_from(row, reason, tokenizer):
    with pytest.raises(UnusableError) as caught:
        SFTReader(columns_to_read(tuple(row)), tokenizer, "</s>")(row)
    assert caught.value.args[0] == reason


def test_unreadable_rows_are_counted_and_named(tokenizer, caplog):
    columns = dict.fromkeys(("prompt", "chosen", "rejected"), Json())
    rows = [
        {"prompt": [user("n")], "chosen": "a", "rejected": "b"}, {"prompt": "n", "chosen": "a", "rejected": "b"},
        {"prompt": [user("n")], "chosen": 3, "rejected": "b"}, {"prompt": [user("n")], "chosen": 4, "rejected": "b"},
    ]  # fmt: skip
    dataset = Dataset.from_list(rows, features=Features(columns))
    usable, count = read_rows("d", dataset, PreferenceReader(tuple(columns), tokenizer))
    assert list(usable["row"]) == [1]
    assert str(count).startswith(
        "d: 4 rows, 3 of them left out: 1 are texts where other rows are chats, 2 can't be read (first: row 2; row 3: "
        "chosen must be a text or a list of chat messages; got 3."
    )
    with pytest.raises(DeRaError, match=r"That is more than max_bad_rows=0\.5 of them"):
        count.check(0.5)
    count.check(0.8)
    _, count = read_rows("d", dataset.select([2, 3]), PreferenceReader(tuple(columns), tokenizer))
    with pytest.raises(DeRaError, match="No row is left to train on"):
        count.check(1.0)


def test_chats_with_dates_of_a_table(tokenizer):
    """As chats that were recorded have them; neither JSON nor a template knows them."""
    rows = [{"messages": [{**user("n"), "timestamp": datetime(2024, 1, 2)}, {**answer("m"), "timestamp": None}]}] * 2
    usable, count = read_rows("d", Dataset.from_list(rows), SFTReader(("messages",), tokenizer, "</s>"))
    assert list(usable["messages"]) == [[user("n"), answer("m")]] * 2
    assert str(count) == "d: 2 rows, all usable"


def random_value(rng: random.Random, depth: int = 0):
    """What a row may hold, most of it no text and no chat."""
    roles, texts = ["user", "human", "assistant", "gpt", "system", None, 3], ["n", " ", "", "a\ud800", HH, "[1]", "{}"]
    leaves = [None, *texts, 0, 1.5, True, float("nan"), [], {}]
    if depth == 3 or rng.random() < 0.4:
        return rng.choice(leaves)
    inner = [random_value(rng, depth + 1) for _ in range(2)]
    message = {
        rng.choice(["role", "from"]): rng.choice(roles),
        rng.choice(["content", "value", "tool_calls"]): inner[0],
    }
    return rng.choice([inner, message, [message], [user("n"), message], [{"type": "text", "text": inner[1]}]])


def test_no_row_is_a_traceback(tokenizer):
    """Whatever it holds, it is read or named."""
    rng, context, read_at_all = random.Random(3), ("system", "tools", "chat_template_kwargs"), 0
    for _ in range(3000):
        columns = ("chosen", "rejected", rng.choice(["prompt", "conversations", "question", "other"]), *context)
        kinds = [("prompt", "completion"), ("messages",), ("conversations",), ("text",)]
        of_sft = rng.choice(kinds)
        for names, reader in (
            (columns, PreferenceReader(columns, tokenizer)),
            ((*of_sft, *context), SFTReader(of_sft, tokenizer, "</s>")),
        ):
            with suppress(UnusableError):
                reader({name: random_value(rng) for name in names})
                read_at_all += 1
        with suppress(DeRaError):
            row = {"prompt": random_value(rng), **{name: random_value(rng) for name in context}}
            encode(read_prompts([row]), tokenizer, LlamaConfig(), 4, chat=rng.random() < 0.7)
    assert read_at_all > 50


# -- the whole way -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% if tools is not none and tools is defined %}TOOLS {{ tools[0]['name'] }}\n{% endif %}"
    "{% if mood is defined %}MOOD {{ mood }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class TrainerMadeError(Exception):
    """Stands in for the training itself."""


@pytest.fixture
def made(monkeypatch) -> list:
    """The trainers that the programs made; they are not run."""
    trainers: list = []

    def stop(trainer):
        trainers.append(trainer)
        raise TrainerMadeError

    monkeypatch.setattr(running, "run", stop)
    return trainers


@pytest.fixture(scope="module")
def chat_base(tiny_base, tmp_path_factory):
    """`tiny_base` with a template that knows tools and a mood, and ends each message."""
    folder = tmp_path_factory.mktemp("chat-base")
    for file in tiny_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def prepare(program: str, base, tmp_path, rows: list[dict], **settings):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(TrainerMadeError):
        train(program, tmp_path / "out", model_name_or_path=base, dataset_name=data, **settings)
    return data


def test_a_row_has_the_same_prompt_tokens_in_training_and_in_decoding(chat_base, tmp_path, made, capfd):
    """With tools, arguments of the template, a system message, a system column, and an answer that is begun."""
    answers = {"chosen": [answer("geese")], "rejected": [answer("the boat")]}
    rows = [
        {"prompt": [user("n")], **answers},
        {"prompt": [system("Be brief."), user("n")], **answers},
        {"prompt": [user("n")], "tools": [{"name": "f"}], **answers},
        {"prompt": [user("n")], "chat_template_kwargs": {"mood": "gay"}, **answers},
        {
            "prompt": [user("n"), answer("The")], "system": "Be kind.",
            "chosen": [answer(" geese")], "rejected": [answer(" the boat")],
        },
    ]  # fmt: skip
    texts = [
        "<s>user: n</s>\nassistant:",
        "<s>system: Be brief.</s>\nuser: n</s>\nassistant:",
        "<s>TOOLS f\nuser: n</s>\nassistant:",
        "<s>MOOD gay\nuser: n</s>\nassistant:",
        "<s>system: Be kind.</s>\nuser: n</s>\nassistant: The",
    ]
    data = prepare("dpo", chat_base, tmp_path, rows)
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    decoding = encode(read_prompts(str(data)), tokenizer, LlamaConfig(), 8, chat=True)
    trained = made[0].train_dataset
    assert [tokenizer.decode(ids) for ids in decoding] == texts
    assert list(trained["prompt_ids"]) == decoding
    assert [tokenizer.decode(ids) for ids in trained["chosen_ids"]] == [" geese</s>\n"] * 5
    assert [tokenizer.decode(ids) for ids in trained["rejected_ids"]] == [" the boat</s>\n"] * 5
    assert "5 rows, all usable" in capfd.readouterr().err

    as_turn = tokenizer.apply_chat_template(rows[4]["prompt"], add_generation_prompt=True, return_dict=True)
    assert tokenizer.decode(as_turn["input_ids"]).endswith("assistant: The</s>\nassistant:"), "as TRL has it by itself"


def test_the_end_of_a_prompt_that_becomes_another_token_is_told(chat_base, tmp_path, made, capfd):
    """A space at a prompt's end is part of the next word's token."""
    prepare("dpo", chat_base, tmp_path, [{"prompt": "A ", "chosen": "fox", "rejected": "river"}] * 4)
    assert f"4 rows {SHORTER} (first: row 1: ' ')" in capfd.readouterr().err


def test_text_that_a_template_leaves_out_is_told(tiny_base, tmp_path, made, capfd):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": [system("Be kind."), user("n")], "chosen": "geese", "rejected": "boat"}] * 2
    rows += [{"prompt": [user("n")], "chosen": "geese", "rejected": "boat"}]
    prepare("dpo", tmp_path, tmp_path, rows)
    assert f"2 rows {LEFT_OUT} (first: row 1: 'Be kind.')" in capfd.readouterr().err
    prepare("sft", tmp_path, tmp_path, [{"messages": [system("Be kind."), user("n"), answer("m")]}], overwrite=True)
    assert f"1 row {LEFT_OUT} (first: row 1)" in capfd.readouterr().err


def test_where_the_prompts_are_from_is_told(chat_base, tmp_path, made, capfd):
    rows = [{"question": "n", "system": "Be kind.", "chosen": " geese", "rejected": " boat"}] * 4
    prepare("dpo", chat_base, tmp_path, rows)
    assert "the prompts are the column 'question', with the column 'system' before it" in capfd.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    assert tokenizer.decode(made[0].train_dataset[0]["prompt_ids"]) == "Be kind.\n\nn"


@pytest.mark.parametrize(
    ("program", "rows", "changes", "message"),
    [
        ("dpo", [{"chosen": "The boat waits", "rejected": "The boats"}], {}, r"1 have no prompt \(first: row 1: "),
        (
            "dpo", [{"prompt": [system("x"), user("n")], "chosen": "a", "rejected": "b"}],
            {"chat_template": "{{ raise_exception('System role not supported') }}"},
            r"1 can't be rendered \(first: row 1: the chat template refuses this chat: System role not supported\)",
        ),
        ("sft", [{"messages": [user("n")]}], {"chat_template": "{{ messages + 1 }}"}, "1 can't be rendered"),
        ("sft", [{"messages": [user("n")]}], {"chat_template": None}, "holds chats, and the model's tokenizer has no"),
        ("dpo", [{"prompt": "n", "chosen": "a", "rejected": "b"}], {"eos_token": None}, "has no end token"),
        ("sft", [{"text": "n"}], {"eos_token": None}, "has no end token"),
        ("dpo", [{"prompt": "n", "chosen": "a", "rejected": "b", "images": ["x"]}], {}, "has a column 'images'"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_one_message(program, rows, changes, message, tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        if "token" not in file.name and "template" not in file.name:
            (base / file.name).symlink_to(file)
    tokenizer.save_pretrained(base)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DeRaError, match=message) as caught:
        train(program, tmp_path / "out", model_name_or_path=base, dataset_name=data)
    assert "\n" not in str(caught.value)


def test_sft_with_several_templates_and_a_system_column(tiny_base, tmp_path, made):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
    for file in tiny_base.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    chat = [{"from": "human", "value": "n"}, {"from": "gpt", "value": "m"}]
    prepare("sft", tmp_path, tmp_path, [{"conversations": chat, "system": "Be kind."}])
    ids = made[0].train_dataset[0]["input_ids"]
    assert tokenizer.decode(ids) == "<s>system: Be kind.</s>\nuser: n</s>\nassistant: m</s>\n"


def test_an_unknown_loss_and_a_folder_that_is_a_file(tiny_base, preferences, tmp_path):
    settings = {"model_name_or_path": tiny_base, "dataset_name": preferences}
    with pytest.raises(DeRaError, match=r"loss_type='sigmoyd' is not one of TRL's; do you mean 'sigmoid'\?"):
        train("dpo", tmp_path / "dpo", **settings, loss_type="sigmoyd")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeRaError, match=r"output_dir='.*file' is a file: name a folder"):
        train("dpo", tmp_path / "file", **settings)
