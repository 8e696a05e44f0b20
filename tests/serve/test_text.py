"""Text of tokens as they come."""

import pytest

from dera_peft.serve.text import TextStream


class Bytes:
    """A token is a byte of UTF-8."""

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        return bytes(token_ids).decode(errors="replace")


def pieces(text: str, *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stop)
    shown = []
    for byte in text.encode():
        shown.append(stream.add(byte))
        if stream.stopped:
            return shown, True
    return [*shown, stream.end()], stream.stopped


def test_whole_characters_alone_are_shown():
    shown, _ = pieces("aé€😀b")
    assert [each for each in shown if each] == ["a", "é", "€", "😀", "b"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    stream = TextStream(Bytes())
    assert [stream.add(byte) for byte in "a😀".encode()[:3]] == ["a", "", ""]
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("ababac", ["abac"], "ab"),
        ("xaab", ["aab", "b"], "x"),
        ("one EN", ["END"], "one EN"),
        ("é€", ["€"], "é"),
    ],
)
def test_stop_strings(text, stop, expected):
    """What may be the beginning of one is held back until it is known."""
    shown, stopped = pieces(text, *stop)
    assert "".join(shown) == expected
    assert stopped == (expected != text)
