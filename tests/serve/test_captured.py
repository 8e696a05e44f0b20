"""Requests that join and leave steps which are captured; on a CPU with a stand-in for CUDA's graphs."""

import pytest
import torch
from captured import watch
from compatibility import BASES
from test_engine import LAMBDAS, alone, batched, greedy, ids, run
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer

from dera_peft import DeRaModel
from dera_peft.engine.cuda_graph import CannotRecord
from dera_peft.serve import captured
from dera_peft.serve.engine import Engine
from dera_peft.serve.requests import GenerationRequest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(captured, "COLUMNS", 64)


def make(kind: str = "llama", device: torch.device = CPU, **options):
    """A model whose steps are captured, and what counts them."""
    base = next(base for base in BASES if base.model_type == kind)
    options = {"target_modules": base.targets, "layers_to_transform": [2, 3], **options}
    mixing = options.pop("mixing", "logits")
    model = DeRaModel.from_peft(adapt(make_base(base), **options), mixing=mixing)
    model.capture = True
    return model, watch(model, device)


def eager(model: DeRaModel, requests: list[GenerationRequest], most: int) -> list[list[int]]:
    """What one batched `generate` without captured steps makes of them."""
    model.capture = False
    whole = batched(model, requests, most)
    model.capture = True
    return [tokens[: one.sampling.max_new_tokens] for one, tokens in zip(requests, whole, strict=True)]


@pytest.fixture(scope="module")
def llama(device):
    return make(device=device)


def test_requests_join_and_leave_captured_steps(llama):
    """Of unlike λ and lengths, some longer than those that run; more and fewer of them; past a cache's last column."""
    model, recorder = llama
    lengths = [3, 5, 40, 4, 6, 3, 9, 5, 4, 7, 3, 12]
    requests = [greedy(ids(i, length), LAMBDAS[i % 5], 6 + 3 * i) for i, length in enumerate(lengths)]
    requests.append(greedy(ids(20, 5), 0.5, 60))
    expected = eager(model, requests, 60)
    assert len({tuple(tokens[:6]) for tokens in expected}) > 9
    recorder.recordings = recorder.replays = 0
    engine = Engine(model, make_tokenizer(), prefill_chunk=16)
    found = run(engine, requests, every=3)
    assert [each.tokens for each in found] == expected
    assert recorder.replays > 0.7 * engine.statistics().steps
    recordings = recorder.recordings
    assert recordings <= 8
    again = run(Engine(model, make_tokenizer(), prefill_chunk=16), requests, every=3)
    assert [each.tokens for each in again] == expected
    assert recorder.recordings < 2 * recordings, "recordings are kept for requests that come later"


@pytest.mark.parametrize(("capture", "captured"), [(None, True), (False, False)])
def test_steps_are_captured_on_a_gpu_unless_switched_off(llama, capture, captured):
    """The stand-in's device is the CPU."""
    model, recorder = llama
    requests = [greedy(ids(i, 4), LAMBDAS[i % 5], 8) for i in range(3)]
    recorder.replays = 0
    model.capture = capture
    try:
        run(Engine(model, make_tokenizer()), requests, every=1)
    finally:
        model.capture = True
    assert (recorder.replays > 0) == captured


def test_windows_rules_and_a_step_that_can_not_be_captured(caplog):
    """A window is kept by masks. Requests with a rule are computed beside; so is all of a model that can't be."""
    model, recorder = make("gemma2")
    requests = [greedy(ids(i, 3 + 3 * i), LAMBDAS[i % 5], 20) for i in range(5)]
    expected = eager(model, requests, 20)
    ruled = greedy(ids(6, 7), 1.5, 20, combine="plausible:0.1")
    plan = model.plan(1.5, 1, combine="plausible:0.1")
    model.capture = False
    of_rule = alone(model, GenerationRequest(ruled.prompt, plan, sampling=ruled.sampling))
    model.capture = True
    found = run(Engine(model, make_tokenizer()), [*requests, ruled], every=2)
    assert [each.tokens for each in found] == [*expected, of_rule]
    assert recorder.replays > 15
    assert "not captured" not in caplog.text
    recorder.record = lambda step, device: (_ for _ in ()).throw(CannotRecord("a step waits for the device"))
    model.release_captures()
    found = run(Engine(model, make_tokenizer()), requests, every=2)
    assert [each.tokens for each in found] == expected
    assert caplog.text.count("not captured as CUDA graphs: a step waits for the device") == 1


@pytest.mark.parametrize("mixing", ["logits", "weights"])
def test_room_and_ends(llama, mixing):
    """Where room is short steps are computed as ever; a request that ends gives its place away."""
    model, recorder = llama if mixing == "logits" else make(mixing="weights")
    requests = [greedy(ids(i, 8), LAMBDAS[i % 5], 20 + 9 * i) for i in range(6)]
    expected = eager(model, requests, 65)
    recorder.replays = 0
    engine = Engine(model, make_tokenizer(), max_tokens=1200, prefix_tokens=100)
    handles = [engine.submit(request) for request in requests]
    for _ in range(6):
        engine.step()
    handles[0].cancel()
    engine.step()
    assert engine.statistics().running == 5
    while engine.step():
        assert engine.statistics().held_tokens <= 1100
    assert engine.statistics().held_tokens == 0
    assert [handle.result(0).tokens for handle in handles[1:]] == expected[1:]
    assert 0 < recorder.replays < engine.statistics().steps
