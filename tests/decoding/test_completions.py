"""Which tokens a given completion is scored as."""

import json

import pytest
from tiny_models import make_tokenizer
from transformers import LlamaConfig

from dera_peft import DeRaError
from dera_peft.decoding.completions import encode_completions, read_completions

TOKENIZER = make_tokenizer()
WHOLE = TOKENIZER("The old", add_special_tokens=False)["input_ids"]
DRAWN = [TOKENIZER(letter)["input_ids"][0] for letter in "The"] + TOKENIZER(" old")["input_ids"]  # as sampling may


def encode(tmp_path, end: bool | None = None, ends=(2, 9), **row) -> list[int]:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "p", "completion": "The old", **row}) + "\n")
    (ids,) = encode_completions(read_completions(str(file)), [[1]], TOKENIZER, LlamaConfig(), ends, end)
    return ids


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, {None: WHOLE, True: [*WHOLE, 2], False: WHOLE}),
        ({"finish_reason": "eos"}, {None: [*WHOLE, 2], True: [*WHOLE, 2], False: WHOLE}),
        ({"finish_reason": "eos", "end_token_id": 9}, {None: [*WHOLE, 9], True: [*WHOLE, 9], False: WHOLE}),
        ({"finish_reason": "length", "token_ids": DRAWN}, {None: DRAWN, True: [*DRAWN, 2], False: DRAWN}),
        (
            {"finish_reason": "eos", "end_token_id": 9, "token_ids": [*DRAWN, 9]},
            {None: [*DRAWN, 9], True: [*DRAWN, 9], False: DRAWN},
        ),
        ({"finish_reason": "eos", "end_token_id": 7, "token_ids": [*DRAWN, 7]}, {None: [*DRAWN, 7], False: DRAWN}),
        ({"token_ids": [*DRAWN, 2]}, {None: [*DRAWN, 2], False: DRAWN}),
        ({"token_ids": DRAWN}, {None: DRAWN, True: [*DRAWN, 2]}),
        ({"completion": "The old</s>", "finish_reason": "eos"}, {None: [*WHOLE, 2], True: [*WHOLE, 2]}),
    ],
    ids=str,
)
def test_tokens_as_drawn_and_the_end_that_the_row_names(tmp_path, row, expected):
    assert DRAWN != WHOLE
    assert TOKENIZER.decode(DRAWN) == "The old"
    assert {end: encode(tmp_path, end, **row) for end in expected} == expected


def test_tokens_of_another_text_are_left_aside_and_that_is_said(tmp_path, caplog):
    assert encode(tmp_path, token_ids=[5, 6, 2], finish_reason="eos") == [*WHOLE, 2]
    assert "1 of 1 completions have token_ids of another text or tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"token_ids": "12"}, "line 1: token_ids must be a list of ids of tokens; got '12'"),
        ({"token_ids": [1, -2]}, "token_ids must be a list of ids"),
        ({"token_ids": [1.0]}, "token_ids must be a list of ids"),
        ({"end_token_id": "</s>"}, "end_token_id must be the id of a token; got '</s>'"),
        ({"finish_reason": "eos", "ends": []}, "neither the tokenizer nor the base has an end token; pass --no-end"),
    ],
)
def test_rows_that_cannot_be(tmp_path, row, message):
    with pytest.raises(DeRaError, match=message):
        encode(tmp_path, **row)
