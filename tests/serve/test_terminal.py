"""`dera chat`: the answers of `dera generate` at the λ that was dialled, and its commands."""

import io
import json

import pytest

from dera_peft.decoding.batching import decode
from dera_peft.decoding.completions import read_completions
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.serve.engine import Engine
from dera_peft.serve.terminal import Terminal

SAMPLING = Sampling(max_new_tokens=8, temperature=0.7, seed=2)


@pytest.fixture
def talk(served_model, served_tokenizer):
    """Runs lines through a terminal; returns it and what it showed."""

    def run(*lines, chat=True, system=None):
        out = io.StringIO()
        with Engine(served_model, served_tokenizer) as engine:
            terminal = Terminal(engine, served_tokenizer, SAMPLING, 1.0, chat, system, out, (-5.0, 5.0))
            terminal.run([f"{line}\n" for line in lines])
        return terminal, out.getvalue()

    return run


def generated(model, tokenizer, text, lam):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ((made,),) = decode(model, tokenizer, [ids], [Request(0, lam)], SAMPLING)
    return made.text


def test_a_chat_goes_on_at_the_lambda_that_is_dialled(talk, served_model, served_tokenizer):
    terminal, shown = talk("Who?", "/lambda 0.25", "And now?", "/retry", "/lambda", system="Be brief.")
    head = "<s>system: Be brief.\nuser: Who?\nassistant:"
    first = generated(served_model, served_tokenizer, head, 1.0)
    second = generated(
        served_model,
        served_tokenizer,
        f"{head} {first}\nuser: And now?\nassistant:".replace(": " + first, ": " + first),
        0.25,
    )
    assert [said.text for said in terminal.answers] == [first, second, second]
    assert shown == f"{first}\nλ=0.25\n{second}\n{second}\nλ=0.25\n"
    assert [message["role"] for message in terminal.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_text_is_continued_and_compared_and_saved(talk, served_model, served_tokenizer, tmp_path):
    file = tmp_path / "said.jsonl"
    _, shown = talk("/compare 0", "The old", f"/save {file}", chat=False)
    one, other = (generated(served_model, served_tokenizer, "The old", lam) for lam in (1.0, 0.0))
    assert one != other
    assert shown == f"beside λ=0\nλ=1\n{one}\nλ=0\n{other}\n2 answers in {file}\n"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["prompt"], row["lambda"], row["completion"]) for row in rows] == [
        ("The old", 1.0, one), ("The old", 0.0, other),
    ]  # fmt: skip
    assert [given.completion for given in read_completions(str(file))] == [one, other]


def test_mistakes_are_told_of_and_the_next_line_is_read(talk, tmp_path):
    lines = (
        "/nothing",
        "/lambda x",
        "/lambda 5.5",
        "/compare -6",
        "/retry",
        "/save",
        f"/save {tmp_path}",
        "x" * 2000,
        "/help",
        "/quit",
        "never",
    )
    terminal, shown = talk(*lines)
    assert terminal.answers == []
    for says in (
        "there is no /nothing", "'x' is not a number", "λ=5.5 is out of range, -5 to 5", "λ=-6 is out",
        "nothing was said", "name a file", "can't be written", "model's context 256", "/compare 0",
    ):  # fmt: skip
        assert says in shown


class Interrupted(io.StringIO):
    """Ctrl-C comes when something is shown for the third time."""

    writes = 0

    def write(self, text):
        self.writes += 1
        if self.writes == 3:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interruption_ends_an_answer_and_not_the_conversation(served_model, served_tokenizer):
    out = Interrupted()
    with Engine(served_model, served_tokenizer) as engine:
        long = Sampling(max_new_tokens=200, temperature=0)
        terminal = Terminal(engine, served_tokenizer, long, 0.5, False, None, out, (-5.0, 5.0))
        terminal.run(["/compare 0\n", "The old\n", "/compare\n", "/lambda 1\n"])
    assert [said.finish_reason for said in terminal.answers] == ["cancelled", "cancelled"]
    assert out.getvalue().endswith("one answer\nλ=1\n")
