"""What clients get: the text of `DeRaModel.generate` at each λ, in OpenAI's forms, whole and streamed."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling

PROMPTS = ["The old lighthouse", "A fox crossed the frozen", "My sister repairs", "Rain fell on the market, so"]
LAMBDAS = [0, 0.5, 1, 2]


def generated(server, prompt, lam, n=12, **sampling):
    """(text, tokens, reason) of transformers' own loop, by the project's batched decoding of this request alone."""
    ids = server.service.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    sampling = Sampling(**{"max_new_tokens": n, "temperature": 0.0, **sampling})
    ((made,),) = decode(server.service.model, server.service.tokenizer, [ids], [Request(0, lam)], sampling)
    return made.text, made.tokens, {"eos": "stop"}.get(made.finish_reason, "length")


def test_concurrent_requests_with_mixed_lambda_equal_generate(server):
    cases = [(prompt, lam) for prompt in PROMPTS for lam in LAMBDAS]
    expected = [generated(server, *case) for case in cases]
    assert len({text for text, *_ in expected[:4]}) > 2  # λ matters

    def ask(case):
        prompt, lam = case
        made = server.client.completions.create(
            model="dpo", prompt=prompt, max_tokens=12, temperature=0, extra_body={"lambda": lam}
        )
        return made.choices[0].text, made.usage.completion_tokens, made.choices[0].finish_reason

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(ask, cases))
    assert got == [(text, len(tokens), reason) for text, tokens, reason in expected]


def test_lambda_in_the_name_of_the_model(server):
    texts = {}
    for lam in (0, 0.5, 1):
        by_field = server.complete(prompt=PROMPTS[0], max_tokens=12, temperature=0, **{"lambda": lam})
        by_name = server.complete(model=f"dpo@{lam}", prompt=PROMPTS[0], max_tokens=12, temperature=0)
        assert by_field["choices"] == by_name["choices"]
        assert (by_name["model"], by_name["lambda"]) == (f"dpo@{lam}", lam)
        texts[lam] = by_name["choices"][0]["text"]
    assert len({*texts.values()}) > 1
    plain = server.complete(model="dpo", prompt=PROMPTS[0], max_tokens=12, temperature=0)
    assert plain["choices"][0]["text"] == texts[1]  # the model's own λ


def test_a_rule_and_a_schedule_are_those_of_generate(server):
    model, tokenizer = server.service.model, server.service.tokenizer
    ids = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    texts = []
    for given in (
        {"lam": 3.0}, {"lam": 3.0, "combine": "plausible:0.2"}, {"lambda_schedule": {"0": 3.0, "4": 0.0}},
    ):  # fmt: skip
        asked = {"lambda" if name == "lam" else name: value for name, value in given.items()}
        made = server.complete(prompt=PROMPTS[0], max_tokens=12, temperature=0, **asked)["choices"][0]["text"]
        if schedule := given.get("lambda_schedule"):
            given = {"lambda_schedule": {int(place): lam for place, lam in schedule.items()}}
        tokens = model.generate(**ids, **given, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert made == tokenizer.decode(tokens, skip_special_tokens=True)
        texts.append(made)
    assert len({*texts}) == 3


def test_models_are_listed_the_plain_name_first(server):
    names = [model.id for model in server.client.models.list()]
    assert names == ["dpo", "dpo@0", "dpo@0.5", "dpo@1"]
    assert server.client.models.retrieve("dpo@0.25").id == "dpo@0.25"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")


def test_a_seeded_sample_is_that_of_the_command_whatever_else_runs(server):
    expected = [
        generated(server, PROMPTS[0], 0.5, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=seed)[0]
        for seed in (7, 8)
    ]
    assert expected[0] != expected[1]

    def ask(seed):
        body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": seed, "top_k": 40}
        return server.complete(**body, min_p=0.01, **{"lambda": 0.5})["choices"][0]["text"]

    with ThreadPoolExecutor(22) as pool:
        got = list(pool.map(ask, [7, *range(100, 120), 8]))
    assert [got[0], got[-1]] == expected


def test_n_samples_of_several_prompts(server):
    body = {"prompt": PROMPTS[:2], "n": 3, "max_tokens": 8, "seed": 3, "lambda": 2}
    choices = server.complete(**body)["choices"]
    assert [choice["index"] for choice in choices] == [*range(6)]
    ids = [server.service.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    for prompt in range(2):
        requests = [Request(0, 2.0, sample) for sample in range(3)]
        made = [
            each
            for batch in decode(
                server.service.model, server.service.tokenizer, [ids[prompt]], requests, Sampling(8, seed=3)
            )
            for each in batch
        ]
        texts = {each.request.sample: each.text for each in made}
        assert [choice["text"] for choice in choices[3 * prompt : 3 * prompt + 3]] == [texts[k] for k in range(3)]
    usage = server.complete(**body)["usage"]
    assert usage["prompt_tokens"] == sum(map(len, ids))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("further", [{}, {"stop": ["e", "zz"]}, {"logprobs": 2, "n": 2}])
def test_streamed_equals_whole(server, further):
    body = {"prompt": PROMPTS[1], "max_tokens": 24, "seed": 5, "lambda": 1.5, "temperature": 0.8, **further}
    whole = server.complete(**body)
    with server.client.completions.create(
        model="dpo", stream=True, stream_options={"include_usage": True},
        extra_body={name: value for name, value in body.items() if name != "prompt"}, prompt=body["prompt"],
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude_none=True) == {
        **whole["usage"], "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details.model_dump(exclude_none=True),
    }  # fmt: skip
    for choice in whole["choices"]:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice["index"]]
        assert "".join(each.text for each in own) == choice["text"]
        assert [each.finish_reason for each in own if each.finish_reason] == [choice["finish_reason"]]
        assert own[-1].finish_reason
        if "logprobs" in further:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                streamed = [value for each in own if each.logprobs for value in getattr(each.logprobs, name)]
                assert streamed == choice["logprobs"][name]
    if "stop" not in further:
        assert len(chunks) > 10  # it does come in pieces


def test_a_chat_is_rendered_and_answered(server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
    rendered = "<s>system: Be brief.\nuser: Who is there?\nassistant:"
    ids = server.service.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    text, tokens, reason = generated(server, ids, 0.5)
    body = {"model": "dpo@0.5", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    made = server.client.chat.completions.create(**body)
    assert (made.object, made.choices[0].message.role) == ("chat.completion", "assistant")
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (text, reason)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), len(tokens))
    chunks = list(server.client.chat.completions.create(**body, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == reason
    # by default as long as there is room
    del body["max_completion_tokens"]
    assert server.client.chat.completions.create(**body).usage.total_tokens <= 256


def test_an_answer_that_is_begun_is_continued(server):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The old"}]
    ids = server.service.tokenizer("<s>user: Who?\nassistant: The old", add_special_tokens=False)["input_ids"]
    made = server.client.chat.completions.create(model="dpo@0", messages=messages, max_tokens=6, temperature=0)
    assert made.choices[0].message.content == generated(server, ids, 0, 6)[0]


def as_bytes(token: str) -> bytes:
    """Of a token's text, in which a part of a character is written as bytes."""
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


def as_text(tokens: list[str]) -> str:
    return b"".join(map(as_bytes, tokens)).decode(errors="replace")


@torch.no_grad()
def log_probs(server, ids, lam):
    """`[T-1, V]`, from a pass over the whole sequence."""
    return server.service.model(torch.tensor([ids]), lam=lam).logits[0, :-1].log_softmax(-1)


def test_logprobs_are_the_mixtures(server):
    prompt = server.service.tokenizer(PROMPTS[0])["input_ids"]
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.5, "seed": 1, "lambda": 0.5, "return_token_ids": True}
    made = server.complete(**body, logprobs=3)
    choice = made["choices"][0]
    assert made["prompt_token_ids"] == prompt
    tokens = choice["token_ids"]
    expected = log_probs(server, [*prompt, *tokens], 0.5)[len(prompt) - 1 :]
    told = choice["logprobs"]
    assert told["token_logprobs"] == pytest.approx(
        [float(row[t]) for row, t in zip(expected, tokens, strict=True)], abs=1e-4
    )
    assert as_text(told["tokens"]) == choice["text"]
    for row, token, text, top in zip(expected, tokens, told["tokens"], told["top_logprobs"], strict=True):
        most = row.topk(3).values.tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(most, abs=1e-4)
        assert top[text] == pytest.approx(float(row[token]), abs=1e-4)

    rendered = server.service.tokenizer("<s>user: Hi\nassistant:", add_special_tokens=False)["input_ids"]
    made = server.client.chat.completions.create(
        model="dpo@0.5", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=2, extra_body={"return_token_ids": True},
    )  # fmt: skip
    content = made.choices[0].logprobs.content
    tokens = made.choices[0].token_ids
    expected = log_probs(server, [*rendered, *tokens], 0.5)[len(rendered) - 1 :]
    assert [each.logprob for each in content] == pytest.approx(
        [float(r[t]) for r, t in zip(expected, tokens, strict=True)], abs=1e-4
    )
    assert [len(each.top_logprobs) for each in content] == [2] * 4
    text = b"".join(bytes(each.bytes) for each in content).decode(errors="replace")
    assert text == made.choices[0].message.content


def test_a_prompt_is_echoed_with_its_logprobs(server):
    prompt = server.service.tokenizer(PROMPTS[2])["input_ids"]
    made = server.complete(prompt=PROMPTS[2], max_tokens=0, echo=True, logprobs=1, **{"lambda": 0.5})["choices"][0]
    assert (made["text"], made["finish_reason"]) == (PROMPTS[2], "length")
    expected = log_probs(server, prompt, 0.5)
    told = made["logprobs"]
    assert told["token_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(
        [float(r[t]) for r, t in zip(expected, prompt[1:], strict=True)], abs=1e-4
    )
    assert [max(top.values()) for top in told["top_logprobs"][1:]] == pytest.approx(
        expected.max(-1).values.tolist(), abs=1e-4
    )
    assert "".join(told["tokens"]) == PROMPTS[2]

    both = server.complete(prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=0, **{"lambda": 0.5})
    text = generated(server, prompt, 0.5, 4)[0]
    assert both["choices"][0]["text"] == PROMPTS[2] + text
    assert len(both["choices"][0]["logprobs"]["tokens"]) == len(prompt) + 4
    streamed = server.client.completions.create(
        model="dpo@0.5", prompt=PROMPTS[2], max_tokens=4, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPTS[2] + text


def test_offsets_are_those_of_characters_of_which_tokens_hold_parts(server):
    text = "ab🦊 é🦊c"
    form = {"response_format": {"type": "regex", "regex": text}, "logprobs": 0}
    made = server.complete(prompt=text, max_tokens=20, echo=True, **form)["choices"][0]
    own = server.complete(prompt=text, max_tokens=20, **form)["choices"][0]
    assert (made["text"], own["text"]) == (text + text, text)
    for told, whole in ((made["logprobs"], text + text), (own["logprobs"], text)):
        assert sum(token.startswith("bytes:") for token in told["tokens"]) >= 10
        parts = [as_bytes(token) for token in told["tokens"]]
        assert b"".join(parts).decode() == whole
        before = [b"".join(parts[:place]).decode(errors="ignore") for place in range(len(parts))]
        assert told["text_offset"] == [len(characters) for characters in before]


def test_penalties_and_biases_change_the_text(server):
    body = {"prompt": PROMPTS[3], "max_tokens": 24, "temperature": 0, "lambda": 1, "return_token_ids": True}
    plain = server.complete(**body)["choices"][0]
    first = plain["token_ids"][0]
    biased = server.complete(**body, logit_bias={str(first): -100})["choices"][0]
    assert first not in biased["token_ids"]
    often = server.complete(**body, logit_bias={str(first): 100})["choices"][0]["token_ids"]
    assert often == [first] * 24
    varied = server.complete(**body, logit_bias={str(first): 3}, presence_penalty=2, frequency_penalty=2)
    assert len({*varied["choices"][0]["token_ids"]}) > 12
    assert (
        server.complete(**body, repetition_penalty=1.8)["choices"][0]["text"]
        == (generated(server, PROMPTS[3], 1, 24, repetition_penalty=1.8)[0])
    )


def test_a_schema_and_an_expression_hold_for_the_mixture(server):
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
    }  # fmt: skip
    texts = set()
    for lam, seed in ((0, 1), (0.5, 2), (2, 3)):
        made = server.client.chat.completions.create(
            model=f"dpo@{lam}", messages=[{"role": "user", "content": "Hi"}], seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
        assert made.choices[0].finish_reason == "stop"
        value = json.loads(made.choices[0].message.content)
        assert {*value} == {"ok", "kind"}
        assert value["ok"] in (True, False)
        assert value["kind"] in ("a", "b")
        texts.add(made.choices[0].message.content)
    assert len(texts) > 1
    form = {"type": "regex", "regex": "[0-9]{3}-[ab]+z"}
    for lam in (0.0, 0.5):
        text = server.complete(prompt="Hi", response_format=form, **{"lambda": lam}, seed=4, max_tokens=200)
        assert text["choices"][0]["text"][3] == "-"
        assert text["choices"][0]["text"].endswith("z")


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_go_through_the_chat_template(server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    with_tools = server.post("/v1/chat/completions", {**body, "tools": [TOOL], "return_token_ids": True}).json()
    prompt = server.service.tokenizer.decode(with_tools["prompt_token_ids"])
    assert prompt.startswith("<s>tools: [{")
    assert "weather" in prompt
    without = server.post("/v1/chat/completions", {**body, "tools": [TOOL], "tool_choice": "none"}).json()
    assert (
        without["usage"]["prompt_tokens"] == server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    )
    # a call that the client sends back has its arguments as JSON; the template reads them
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        *body["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    answer = server.post("/v1/chat/completions", {**body, "messages": messages, "return_token_ids": True}).json()
    assert "calls Ulm\ntool: rain" in server.service.tokenizer.decode(answer["prompt_token_ids"])


def test_calls_are_parsed_by_the_tokenizers_own_rules(server, monkeypatch):
    parsed = {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Ulm"}}}]}
    tokenizer = server.service.tokenizer
    monkeypatch.setattr(tokenizer, "response_template", {}, raising=False)
    monkeypatch.setattr(tokenizer, "parse_response", lambda *given, **how: parsed, raising=False)
    body = {"model": "dpo", "messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "max_tokens": 4}
    choice = server.client.chat.completions.create(**body).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.model_dump() == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    chunks = [chunk.choices[0] for chunk in server.client.chat.completions.create(**body, stream=True)]
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].delta.tool_calls[0].function.name == "weather"
    assert chunks[-1].finish_reason == "tool_calls"
