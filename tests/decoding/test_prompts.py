"""Prompts from texts, files and functions; every fault with its place."""

import io
import json

import pytest
from datasets import Dataset
from tiny_models import make_tokenizer
from transformers import LlamaConfig

from dera_peft import DeRaError
from dera_peft.decoding.completions import read_completions
from dera_peft.decoding.prompts import encode, from_dataset, from_file, from_lines, from_texts, read_prompts

CHAT = [{"role": "user", "content": "Hello"}]


def write(tmp_path, name: str, *lines) -> str:
    file = tmp_path / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(file)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\r\n\r\n", "\n  \t\n\n", "\r\n \r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_blank_lines_at_the_end_are_no_prompts(tmp_path, mark, end):
    newline = "\r\n" if "\r" in end else "\n"
    files = {"p.txt": ["a", "b"], "p.jsonl": ['{"prompt": "a"}', '{"prompt": "b"}'], "p.csv": ["prompt", "a", "b"]}
    for name, lines in files.items():
        (tmp_path / name).write_bytes((mark + newline.join(lines) + end).encode())
        assert [prompt.content for prompt in from_file(str(tmp_path / name))] == ["a", "b"]
    assert [p.content for p in from_lines(io.StringIO(mark + "a\nb" + end), "standard input")] == ["a", "b"]
    completions = [f'{{"prompt": "a", "completion": "{text}"}}' for text in "cd"]
    (tmp_path / "c.jsonl").write_bytes((mark + newline.join(completions) + end).encode())
    assert [(each.prompt.index, each.completion) for each in read_completions(str(tmp_path / "c.jsonl"))] == [
        (0, "c"), (1, "d"),
    ]  # fmt: skip


def test_a_blank_line_between_prompts_is_told_with_its_number(tmp_path):
    with pytest.raises(DeRaError, match=r"p\.txt, line 2: the prompt is empty"):
        from_file(write(tmp_path, "p.txt", "a", "", "b"))
    with pytest.raises(DeRaError, match="has no prompts in it"):
        from_file(write(tmp_path, "p.txt", "", " "))
    with pytest.raises(DeRaError, match=r"p\.jsonl, line 1: not valid UTF-8: an escape names half of a character"):
        from_file(write(tmp_path, "p.jsonl", '{"prompt": "a", "topic": "\\ud83d"}'))


def test_texts_lines_and_files(tmp_path):
    assert [prompt.content for prompt in from_texts(["a", "b"])] == ["a", "b"]
    assert [prompt.content for prompt in from_lines(io.StringIO("a\nb\n"), "standard input")] == ["a", "b"]
    assert [prompt.content for prompt in from_file(write(tmp_path, "p.txt", "a", "b"))] == ["a", "b"]
    rows = from_file(
        write(tmp_path, "p.jsonl", {"prompt": "a", "lambda": 0.5, "topic": "x"}, {"prompt": CHAT, "lambda": [0, 1]})
    )
    assert [(p.index, p.content, p.lam, p.columns) for p in rows] == [
        (0, "a", (0.5,), {"topic": "x"}),
        (1, CHAT, (0.0, 1.0), {}),
    ]
    (tmp_path / "made.py").write_text(
        "from datasets import Dataset\n"
        "def rows(): return Dataset.from_list([{'prompt': 'a', 'topic': 'x'}])\n"
        "def texts(): return ['a', 'b']\n"
    )
    assert [(p.content, p.columns) for p in from_file(f"{tmp_path}/made.py:rows")] == [("a", {"topic": "x"})]
    assert [p.content for p in from_file(f"{tmp_path}/made.py:texts")] == ["a", "b"]


def test_rows_of_a_csv_file_and_of_a_list(tmp_path):
    file = write(tmp_path, "p.csv", "prompt,lambda,answer", '"a, and', 'b",0.5,x', "", "c,1,")
    assert [(p.content, p.lam, p.columns, p.source) for p in read_prompts(file)] == [
        ("a, and\nb", (0.5,), {"answer": "x"}, f"{file}, line 2"),
        ("c", (1.0,), {"answer": ""}, f"{file}, line 5"),
    ]
    (prompt,) = read_prompts(write(tmp_path, "q.csv", "question,prompt", "a,b"), column="question")
    assert (prompt.content, prompt.columns) == ("a", {"prompt": "b"})
    made = read_prompts(["a", CHAT, {"prompt": "b", "topic": "x"}], limit=3)
    assert [(p.index, p.content, p.columns) for p in made] == [(0, "a", {}), (1, CHAT, {}), (2, "b", {"topic": "x"})]
    with pytest.raises(DeRaError, match="prompts, prompt 2: must be a text, a chat or a row; got 3"):
        read_prompts(["a", 3])


def test_prompts_of_a_dataset(tmp_path):
    """A folder of files, a folder that `save_to_disk` wrote, and a table; a chat's answer is left away."""
    answered = [*CHAT, {"role": "assistant", "content": "Hi"}]
    rows = [{"chat": answered, "topic": "x"}, {"chat": CHAT, "topic": "y"}]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for name, split in (("files", "test"), ("saved", "train"), ("rows.parquet", "train")):
        found = read_prompts(f"{tmp_path}/{name}", "chat", split)
        assert [(p.content, p.columns) for p in found] == [(CHAT, {"topic": "x"}), (CHAT, {"topic": "y"})]
    (first,) = read_prompts(f"{tmp_path}/saved", "chat", limit=1)
    assert first.source == f"{tmp_path}/saved, row 1"
    with pytest.raises(DeRaError, match=r"has no column 'prompt'; it has \['chat', 'topic'\]: set prompt_column"):
        read_prompts(f"{tmp_path}/saved")
    with pytest.raises(DeRaError, match=r"prompts='.*none', split='train' can't be read: FileNotFoundError"):
        read_prompts(f"{tmp_path}/none")


def test_rows_of_a_dataset_without_a_prompt_are_an_error_or_left_out(tmp_path):
    answer = {"role": "assistant", "content": "Hi"}
    rows = [{"chat": [answer], "topic": "x", "n": 1}, {"chat": None, "topic": "y", "n": 2}]
    rows += [{"chat": [*CHAT, answer], "topic": "z", "n": 3}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    name = str(tmp_path / "rows")
    with pytest.raises(DeRaError, match="rows, row 1: the prompt is empty"):
        read_prompts(name, "chat")
    settings = {"column": "chat", "argument": "dataset_name", "skip_empty": True}
    (found,), left_out = from_dataset(name, columns=["n", "chat"], **settings)
    assert (found.index, found.content, found.source, left_out) == (0, CHAT, f"{name}, row 3", 2)
    assert found.columns == {"n": 3, "chat": [*CHAT, answer]}
    with pytest.raises(DeRaError, match=r"^dataset_name='.*' has no column 'm'; it has \['chat', 'topic', 'n'\]\.$"):
        from_dataset(name, columns=["m"], **settings)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("p.txt", ["a", "", "b"], "p.txt, line 2: the prompt is empty"),
        ("p.jsonl", [{"prompt": "a"}, "{'prompt': 1}"], "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", [{"prompt": "a"}, ["b"]], "p.jsonl, line 2: a row must be a JSON object"),
        ("p.jsonl", [{"text": "a"}], r"p.jsonl, line 1: has no key 'prompt'; its keys are \['text'\]"),
        ("p.jsonl", [{"prompt": 3}], "p.jsonl, line 1: a prompt must be a text"),
        ("p.jsonl", [{"prompt": "  "}], "p.jsonl, line 1: the prompt is empty"),
        ("p.jsonl", [{"prompt": "a", "lambda": "b"}], "p.jsonl, line 1: lambda must be a finite number"),
        ("p.jsonl", ['{"prompt": "a", "lambda": NaN}'], "p.jsonl, line 1: lambda must be a finite number"),
        ("p.jsonl", [{"prompt": "a", "lambda": -1e39}], "p.jsonl, line 1: lambda must be a finite number"),
        ("p.jsonl", [{"prompt": "a", "lambda": []}], "p.jsonl, line 1: lambda is an empty list"),
        ("p.jsonl", ['{"prompt": "\\ud800"}'], "p.jsonl, line 1: not valid UTF-8: an escape names half"),
        ("p.csv", ["prompt,answer", "a,b", "c"], "p.csv, line 3: has 1 values, and the file's first line names 2"),
        ("p.csv", ["prompt", 'a"b', '"c'], "p.csv, line 3: not valid CSV"),
        ("p.csv", ["prompt,lambda", "a,much"], "p.csv, line 2: lambda must be a number, or name=λ,name=λ; got 'much'"),
        ("p.csv", ["text", "a"], "p.csv, line 2: has no key 'prompt'"),
        ("p.text", ["a"], "give a .txt, .jsonl, .csv file"),
    ],
)
def test_faults_are_told_with_their_line(tmp_path, name, lines, message):
    with pytest.raises(DeRaError, match=message):
        from_file(write(tmp_path, name, *lines))


def test_text_is_taken_as_it_stands(tmp_path):
    """No byte order mark; no line break at U+2028, which JSON and texts may hold; each λ once."""
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa\xe2\x80\xa8b\r\nc")
    assert [prompt.content for prompt in from_file(str(tmp_path / "p.txt"))] == ["a\u2028b", "c"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b", "lambda": [0, -0.0, 1, 1.0]}\n', encoding="utf-8")
    (prompt,) = from_file(str(tmp_path / "p.jsonl"))
    assert (prompt.content, str(prompt.lam)) == ("a\u2028b", "(0.0, 1.0)")
    stream = io.TextIOWrapper(io.BytesIO("\ufeffAna\r\nBob\r\n".encode()), encoding="utf-8", newline="\n")
    assert [prompt.content for prompt in from_lines(stream, "standard input")] == ["Ana", "Bob"]
    with pytest.raises(DeRaError, match="standard input can't be read"):
        from_lines(io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"), "standard input")


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(DeRaError, match="there is no such file"):
        from_file(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DeRaError, match="has no prompts"):
        from_file(str(tmp_path / "empty.txt"))


def test_encoding_never_cuts():
    tokenizer, config = make_tokenizer(), LlamaConfig(max_position_embeddings=40)
    (ids,) = encode(from_texts(["A fox"]), tokenizer, config, 8)
    assert tokenizer.decode(ids) == "A fox"
    prompts = from_texts(["A fox", "rain " * 30])
    length = len(tokenizer("rain " * 30)["input_ids"])
    with pytest.raises(DeRaError, match=rf"--prompt 2: the prompt has {length} tokens.*context of 40; shorten it"):
        encode(prompts, tokenizer, config, 8)
    with pytest.raises(DeRaError, match=rf"--prompt 1.*at most {40 - len(ids)} new tokens"):
        encode(from_texts(["A fox"]), tokenizer, config, 40)


def test_chats_are_rendered_with_the_template():
    tokenizer, config = make_tokenizer(), LlamaConfig()
    prompts = from_texts(["Hello"])
    (ids,) = encode(prompts, tokenizer, config, 8, chat=True)
    assert tokenizer.decode(ids) == "<s>user: Hello\nassistant:"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DeRaError, match="--prompt 1: the chat template refuses this chat: roles must alternate"):
        encode(prompts, tokenizer, config, 8, chat=True)
    tokenizer.chat_template = None
    with pytest.raises(DeRaError, match="no chat template"):
        encode(prompts, tokenizer, config, 8, chat=True)
