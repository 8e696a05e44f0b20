"""vLLM in a process of its own, for which a script stands: what it is sent, what its answers become, how it ends."""

import io
import json
import queue
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.noise import row_key
from dera_peft.errors import DeRaError
from dera_peft.remote import offline
from dera_peft.remote.settings import RemoteSettings
from dera_peft.vllm import offline as program
from dera_peft.vllm import versions

# Answers two requests in one line, the second one first, with their prompt's tokens and the end token.
STANDIN = """
import json, sys, time
first = json.loads(sys.stdin.readline())
say = lambda line: print(json.dumps(line), flush=True)
kind = first["arguments"].get("load_format")
if kind == "refused":
    say({"error": "no such model"})
elif kind == "dies":
    print("INFO loading", "ValueError: too little memory", file=sys.stderr, sep="\\n")
    sys.exit(3)
else:
    say({"ready": True})
    if kind == "refuses":
        say({"error": "max_tokens is too large"})
        sys.exit(2)
    seen, waiting = [first], []
    for line in sys.stdin:
        seen.append(json.loads(line))
        waiting.append(seen[-1])
        if len(waiting) == 2:
            if kind == "stops":
                sys.exit("CUDA out of memory")
            say({"finished": [
                {"id": each["id"], "token_ids": [*each["prompt"], 2], "finish_reason": "stop"} for each in waiting[::-1]
            ]})
            waiting = []
    with open(sys.argv[0] + ".seen", "w") as file:
        json.dump(seen, file)
    if kind == "hangs":
        time.sleep(600)
"""
ENDS = [2]
PROMPTS = {0: [10, 11], 1: [12], 2: [13], 3: [14, 15, 16]}


@pytest.fixture
def python(tmp_path) -> Path:
    """What is started as the Python of vLLM's environment."""
    script = tmp_path / "standin.py"
    script.write_text(STANDIN)
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{script}"\n')
    file.chmod(0o755)
    return file


@pytest.fixture
def start(python, tiny_base, tiny_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of logs
    monkeypatch.setattr(ModelSource, "end_tokens", lambda self: ENDS)
    source = ModelSource(base=str(tiny_base), adapter=str(tiny_adapter), dtype="float32", device_map="cpu")

    def start(kind=None, **settings):
        arguments = {"tensor_parallel_size": 2, **({} if kind is None else {"load_format": kind})}
        settings = RemoteSettings(engine="vllm", vllm_python=python, vllm_arguments=arguments, **settings)
        return offline.start_vllm(settings, source, SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids)))

    return start


def test_requests_go_and_completions_come_as_they_finish(start, python, tiny_base, tiny_adapter):
    requests = [Request(index, lam) for index, lam in enumerate([0.0, 1 / 3, NamedLambda({"a": 1, "b": 0.1}), None])]
    sampling = Sampling(
        max_new_tokens=4, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5, seed=7
    )
    with start(concurrency=2) as decoder:
        batches = list(decoder.decode(PROMPTS, requests, sampling))
    assert [[made.request.index for made in batch] for batch in batches] == [[1, 0], [3, 2]]
    made = {each.request.index: each for batch in batches for each in batch}
    assert (made[0].tokens, made[0].text, made[0].end_token_id) == ([10, 11, 2], "[10, 11]", 2)
    first, *lines = json.loads(python.with_name("standin.py.seen").read_text())
    assert first["source"] == {"base": str(tiny_base), "adapter": str(tiny_adapter)}
    assert first["arguments"] == {"dtype": "float32", "tensor_parallel_size": 2}
    assert [line["extra"] for line in lines] == [{"lambda": 0.0}, {"lambda": 1 / 3}, {"lambda": {"a": 1, "b": 0.1}}, {}]
    assert [line["prompt"] for line in lines] == list(PROMPTS.values())
    assert lines[1]["sampling"] == {
        "max_tokens": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5,
        "seed": row_key(7, 1, 0) >> 1, "stop_token_ids": ENDS, "ignore_eos": True,
    }  # fmt: skip
    assert decoder.engine.process.returncode == 0
    assert not decoder.engine.log.exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("refused", "^vLLM: no such model$"),
        ("refuses", "^vLLM: max_tokens is too large$"),  # whether or not the request can still be sent
        ("dies", r"has ended \(code 3\); its log is .*dera-vllm-.*: INFO loading / ValueError: too little memory"),
        ("stops", r"has ended \(code 1\); .*CUDA out of memory"),
    ],
)
def test_what_goes_wrong_is_told(start, kind, said):
    with pytest.raises(DeRaError, match=said), start(kind) as decoder:
        list(decoder.decode(PROMPTS, [Request(0, 0.0), Request(1, 0.0)], Sampling(max_new_tokens=4)))


def test_it_is_ended_where_it_does_not_end(start, monkeypatch):
    monkeypatch.setattr(offline, "ENDS_IN", 0.2)
    begun = time.monotonic()
    with start("hangs") as decoder:
        pass
    assert decoder.engine.process.returncode == -15
    with pytest.raises(KeyboardInterrupt), start() as decoder:
        raise KeyboardInterrupt
    assert decoder.engine.process.returncode is not None
    assert time.monotonic() - begun < 60


def test_without_vllm_here_its_python_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "find_spec", lambda name: None)
    with pytest.raises(DeRaError, match=r"--vllm-python vllm-env/bin/python, or .* docs/guides/vllm.md says how"):
        offline.find_python(RemoteSettings(engine="vllm"))
    with pytest.raises(DeRaError, match="there is no such file"):
        offline.find_python(RemoteSettings(engine="vllm", vllm_python=tmp_path / "python"))
    monkeypatch.setattr(offline, "find_spec", lambda name: name)
    assert offline.find_python(RemoteSettings(engine="vllm")) == Path(sys.executable)


class Engine:
    """Of vLLM, whose every step finishes the request that came last."""

    def __init__(self):
        self.waiting, self.steps = [], 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def add_request(self, name, prompt, params) -> None:
        self.waiting.append((name, prompt, params))

    def step(self):
        self.steps += 1
        name, prompt, params = self.waiting.pop()
        made = SimpleNamespace(
            token_ids=(*prompt["prompt_token_ids"], params["extra_args"]["lambda"]), finish_reason="length"
        )
        unfinished = SimpleNamespace(request_id="x", finished=False, outputs=[])
        return [unfinished, SimpleNamespace(request_id=name, finished=True, outputs=[made])]


def test_the_program_answers_until_its_input_ends(monkeypatch):
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **values: values))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    requests, answers = queue.Queue(), io.StringIO()
    for place in range(3):
        requests.put({"id": place, "prompt": [place + 5], "sampling": {"seed": place}, "extra": {"lambda": place / 2}})
    requests.put(None)
    program.answer(SimpleNamespace(llm_engine=(engine := Engine())), requests, answers)
    lines = [json.loads(line)["finished"] for line in answers.getvalue().splitlines()]
    assert lines == [
        [{"id": place, "token_ids": [place + 5, place / 2], "finish_reason": "length"}] for place in (2, 1, 0)
    ]
    assert engine.steps == 3


def test_the_model_that_the_program_loads(tiny_base, tiny_adapter, monkeypatch):
    assert program.model_arguments({"base": str(tiny_base), "revision": "x"}) == {
        "model": str(tiny_base),
        "revision": "x",
    }
    monkeypatch.setattr(versions, "_version", {"vllm": "0.32.0"}.get)
    found = program.model_arguments({"base": str(tiny_base), "adapter": str(tiny_adapter)})
    assert found["hf_overrides"] == {"architectures": ["DeRaLlamaForCausalLM"]}
    with pytest.raises(DeRaError, match=r"is in vLLM's environment, and 0\.0\.1 in the one that asks"):
        program.load({"version": "0.0.1", "source": {}, "arguments": {}})


def test_dtype_and_quantization_are_those_that_a_model_would_be_loaded_with(tiny_base):
    settings = RemoteSettings(engine="vllm", vllm_arguments={"max_model_len": 64})
    base = {"base": str(tiny_base)}
    assert offline.arguments(settings, ModelSource(**base)) == {
        "dtype": "float32",
        "max_model_len": 64,
    }  # the checkpoint's
    found = offline.arguments(settings, ModelSource(**base, dtype="bfloat16", quantization="nf4"))
    assert found == {"dtype": "bfloat16", "quantization": "bitsandbytes", "max_model_len": 64}
