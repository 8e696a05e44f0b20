"""Requests that join and leave between steps, against `generate` and `decode` of each alone."""

import asyncio
import gc
import random
import time

import pytest
import serve_check
import torch
from compatibility import BASES, ENCODER_DECODERS, VOCABULARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.serve import scheduler
from dera_peft.serve.engine import Engine, EngineClosed, QueueFull
from dera_peft.serve.requests import GenerationRequest

LAMBDAS = [0.0, 0.5, 1.0, 1.5, -0.5]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
UNLIKE = ["gemma2", "bloom", "gemma4_text", "jamba"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tiny_base, tiny_adapter) -> DeRaModel:
    return DeRaModel.from_pretrained(tiny_base, tiny_adapter)


def ids(seed: int, length: int, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, vocabulary), k=length))


def greedy(prompt, lam, new: int = 12, **options) -> GenerationRequest:
    sampling = Sampling(temperature=0, max_new_tokens=new, repetition_penalty=options.pop("repetition_penalty", 1.0))
    return GenerationRequest(prompt, lam, sampling=sampling, **{"ignore_eos": True, **options})


def alone(model, request: GenerationRequest, **options) -> list[int]:
    """What `generate` makes of one request."""
    new = request.sampling.max_new_tokens
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0, **options}
    prompt = torch.tensor([request.prompt])
    return model.generate(prompt, lam=request.lam, **options)[0, prompt.shape[1] :].tolist()


def batched(model, requests: list[GenerationRequest], new: int) -> list[list[int]]:
    """What one batched `generate` makes of requests."""
    longest = max(len(request.prompt) for request in requests)
    prompts = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    lam = [request.lam for request in requests]
    return model.generate(prompts, attention_mask=mask, lam=lam, **options)[:, longest:].tolist()


def run(engine: Engine, requests, every: int = 0) -> list:
    """Submits them, one each `every` steps, and steps until all are done."""
    handles, waiting = [], list(requests)
    while waiting:
        handles.append(engine.submit(waiting.pop(0)))
        for _ in range(every):
            engine.step()
    while engine.step():
        pass
    return [handle.result(timeout=0) for handle in handles]


@pytest.mark.parametrize("kind", UNLIKE)
def test_staggered_requests_equal_generate(kind):
    """16 requests of unlike lengths and λ, one at every second step; `make serve-check` does it on every base."""
    assert serve_check.check(next(base for base in BASES if base.model_type == kind)) is None


def test_the_check_of_every_base_tells_what_is_wrong(monkeypatch, capsys):
    serve = serve_check.serve

    def exchanged(model, requests):
        found = serve(model, requests)
        return [found[1], found[0], *found[2:]]

    monkeypatch.setattr(serve_check, "serve", exchanged)
    assert serve_check.main(["--only", "llama"]) == 1
    assert "llama          the requests [0, 1] have other tokens" in capsys.readouterr().out


def test_encoder_decoders_are_refused(tokenizer):
    base = ENCODER_DECODERS[0]
    peft_model = adapt(make_base(base), target_modules=base.targets, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(DeRaError, match="t5 is an encoder-decoder, which can't be served"):
        Engine(DeRaModel.from_peft(peft_model), tokenizer)


# -- any schedule ------------------------------------------------------------------------------------------------------

POOL = [(length, lam) for length in (1, 4, 12, 40) for lam in LAMBDAS]


@pytest.fixture(scope="module")
def pool(model) -> list[tuple[GenerationRequest, list[int]]]:
    """Requests, of which some begin alike, and their tokens."""
    requests = [greedy((*ids(7, length, 300), 5), lam) for length, lam in POOL]
    requests += [greedy((*ids(7, 30, 300), *ids(i, 4, 300)), LAMBDAS[i % 5]) for i in range(6)]
    return list(zip(requests, batched(model, requests, 12), strict=True))


arrivals = st.lists(
    st.tuples(st.integers(0, len(POOL) + 5), st.integers(0, 3), st.one_of(st.none(), st.integers(0, 15))),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=6, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(arrivals, st.integers(1, 64), st.integers(1, 12), st.integers(60, 400), st.integers(0, 59))
def test_any_schedule_equals_generate(model, tokenizer, pool, arrivals, chunk, rows, tokens, prefixes):
    """Whenever requests come and are cancelled, whatever there is room for."""
    engine = Engine(model, tokenizer, prefill_chunk=chunk, max_rows=rows, max_tokens=tokens, prefix_tokens=prefixes)
    handles, steps = [], 0
    for which, pause, cancelled_at in arrivals:
        request, expected = pool[which]
        handles.append((engine.submit(request), expected, steps + cancelled_at if cancelled_at is not None else None))
        for _ in range(pause):
            engine.step()
            steps += 1
    while engine.step():
        for handle, _, cancelled_at in handles:
            if cancelled_at is not None and steps >= cancelled_at:
                handle.cancel()
        steps += 1
        assert steps < 2000
        assert engine.statistics().prefix_tokens <= prefixes
    for handle, expected, cancelled_at in handles:
        found = handle.result(timeout=0)
        if found.finish_reason == "cancelled":
            assert cancelled_at is not None
            assert found.tokens == expected[: len(found.tokens)]
        else:
            assert (found.tokens, found.finish_reason) == (expected, "length")
    assert engine.statistics().running == engine.statistics().held_tokens == 0


def test_a_request_is_put_back_where_room_is_short(model, tokenizer):
    """More than there is room for as they grow: the last ones wait again, and go on where they were."""
    requests = [greedy(ids(i, 8, 300), 0.5, 48) for i in range(3)]
    engine = Engine(model, tokenizer, max_tokens=250, prefix_tokens=0)
    handles = [engine.submit(request) for request in requests]
    engine.step()
    assert engine.statistics().running == 3
    counts = []
    while engine.step():
        counts.append(engine.statistics().running)
        assert engine.statistics().held_tokens <= 250
    assert counts.index(2) < counts.index(1), "one waited while two were decoded, and went on alone"
    assert [handle.result(0).tokens for handle in handles] == batched(model, requests, 48)


def test_a_long_prompt_does_not_stall_the_others(model, tokenizer):
    engine = Engine(model, tokenizer, prefill_chunk=16)
    short = engine.submit(greedy(ids(1, 5, 300), 1.0, 30))
    engine.step()
    long = engine.submit(greedy(ids(2, 200, 300), 1.0))
    late = None
    for step in range(12):
        before = len(list(short._events))
        engine.step()
        assert len(short._events) == before + 1, "a token each step"
        if step == 2:
            late = engine.submit(greedy(ids(3, 4, 300), 1.0))
    assert late is not None
    assert late.first_token is not None, "nor does a later, shorter one wait for it"
    assert long.first_token is None
    while engine.step():
        pass
    assert long.result(0).tokens == alone(model, long.request)


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=5, max_new_tokens=16, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.3),
        Sampling(seed=6, max_new_tokens=16, min_p=0.05),
    ],
    ids=["warped", "min_p"],
)
def test_seeded_samples_equal_decode_beside_twenty_others(model, tokenizer, sampling):
    prompt = ids(4, 11, 300)
    wanted = [Request(0, lam, sample) for lam in (0.0, 0.5, 1.5) for sample in range(2)]
    expected = {
        completion.request: completion
        for batch in decode(model, tokenizer, [prompt], wanted, sampling)
        for completion in batch
    }
    assert len({tuple(completion.tokens) for completion in expected.values()}) > 3
    with Engine(model, tokenizer, prefill_chunk=32) as engine:
        others = [
            engine.submit(GenerationRequest(ids(i, 3 + i, 300), LAMBDAS[i % 5], sampling=Sampling(seed=i)))
            for i in range(20)
        ]
        handles = {
            request: engine.submit(GenerationRequest(prompt, request.lam, sample=request.sample, sampling=sampling))
            for request in wanted
        }
        for request, handle in handles.items():
            found, completion = handle.result(60), expected[request]
            assert (found.tokens, found.text) == (completion.tokens, completion.text)
            assert found.finish_reason == completion.finish_reason
        for other in others:
            other.cancel()


def test_penalties(model, tokenizer):
    """Against a loop of whole passes: OpenAI's are of the completion alone, transformers' of the prompt too."""
    prompt = (5, 6, 5, 9)
    presence, frequency = 1.5, 0.8
    text = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([text]), lam=0.5).logits[0, -1]
        for token in set(text[4:]):
            logits[token] -= presence + frequency * text[4:].count(token)
        logits[17] += 1.25
        text.append(int(logits.argmax()))
    penalized = greedy(prompt, 0.5, presence_penalty=presence, frequency_penalty=frequency, logit_bias=((17, 1.25),))
    repeated = greedy(prompt, 0.5, repetition_penalty=3.0)
    plain = greedy(prompt, 0.5)
    found = run(Engine(model, tokenizer), [plain, penalized, repeated])
    assert found[1].tokens == text[4:]
    assert found[2].tokens == alone(model, repeated, repetition_penalty=3.0)
    assert found[0].tokens not in (found[1].tokens, found[2].tokens)


def test_logprobs_are_the_mixtures(model, tokenizer):
    asked = GenerationRequest(ids(4, 6, 300), 0.5, sampling=Sampling(temperature=0.5, max_new_tokens=5), logprobs=3)
    without, with_it = run(Engine(model, tokenizer), [greedy(ids(4, 6, 300), 0.5), asked])
    assert without.logprobs is without.top_logprobs is None
    whole = torch.tensor([[*asked.prompt, *with_it.tokens]])
    with torch.no_grad():
        expected = model(whole, lam=0.5).logits[0, 5:-1].log_softmax(-1)
    own = expected[torch.arange(len(with_it.tokens)), with_it.tokens]
    torch.testing.assert_close(torch.tensor(with_it.logprobs), own, atol=1e-4, rtol=1e-4)
    for top, row in zip(with_it.top_logprobs, expected, strict=True):
        assert [token for token, _ in top] == row.topk(3).indices.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in top]), row.topk(3).values, atol=1e-4, rtol=1e-4)


class Even:
    """Allows even tokens alone, and raises after `most` of them."""

    def __init__(self, most: int = 1000):
        self.accepted, self.most = [], most

    def allowed(self):
        mask = torch.zeros(320, dtype=torch.bool)
        mask[::2] = True
        return mask

    def accept(self, token):
        self.accepted.append(token)
        if len(self.accepted) > self.most:
            raise RuntimeError("no such rule")


def test_a_grammar_is_applied_to_the_mixture(model, tokenizer):
    mask = Even()
    request = GenerationRequest(ids(4, 6, 300), 0.5, sampling=Sampling(top_k=3, max_new_tokens=12), mask=mask)
    (found,) = run(Engine(model, tokenizer), [request])
    assert found.tokens == mask.accepted
    assert len(found.tokens) >= 3
    assert all(token % 2 == 0 for token in found.tokens)


RULES = ["plausible:0.1", "aad:0.1", "kl:0.05", "kl_total:2", "jsd"]


def test_each_request_has_its_rule(model, tokenizer):
    """Beside each other, staggered, put back for want of room; with the λ of each token."""
    requests = [
        *(greedy(ids(i, 4 + i, 300), None if rule[:3] == "aad" else 1.5, combine=rule) for i, rule in enumerate(RULES)),
        greedy(ids(6, 7, 300), None, schedule=((0, 0.0), (3, 2.0), (6, 1.0))),
        greedy(ids(7, 9, 300), 0.5),
    ]
    found = run(Engine(model, tokenizer, max_tokens=150, prefix_tokens=0), requests, every=2)
    for request, generated in zip(requests, found, strict=True):
        schedule = dict(request.schedule) or None
        plan = model.plan(request.lam, 1, combine=request.combine, lambda_schedule=schedule)
        assert generated.tokens == alone(model, GenerationRequest(request.prompt, plan, sampling=request.sampling))
        if request.combine[:3] == "aad" or plan.combiner is None:
            assert generated.token_lambda is None
        else:
            torch.testing.assert_close(torch.tensor(generated.token_lambda), plan.token_lambda[0], atol=1e-3, rtol=1e-3)
    with pytest.raises(DeRaError, match="combine='klx'"):
        Engine(model, tokenizer).submit(greedy((5,), 0.5, combine="klx"))


# -- faults ------------------------------------------------------------------------------------------------------------


def test_what_fails_fails_alone(model, tokenizer):
    fine = greedy(ids(4, 6, 300), 0.5)
    too_far = greedy(ids(5, 6, 300), 3e38)
    ungrammatical = greedy(ids(6, 6, 300), 0.5, mask=Even(most=2))
    found = run(Engine(model, tokenizer), [fine, too_far, ungrammatical])
    assert found[0].tokens == alone(model, fine)
    assert (found[1].finish_reason, found[1].tokens) == ("error", [])
    assert "not finite" in found[1].error
    assert (found[2].finish_reason, len(found[2].tokens)) == ("error", 2)
    assert "can't follow the grammar: no such rule" in found[2].error


def test_a_failed_step_ends_its_requests_and_not_the_engine(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer)
    handle = engine.submit(greedy(ids(4, 6, 300), 0.5))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "draw", lambda *_: 1 / 0)
        engine.step()
    assert (handle.finish_reason, handle.result(0).error) == ("error", "decoding failed: division by zero")
    (again,) = run(engine, [handle.request])
    assert again.tokens == alone(model, handle.request)
    assert engine.statistics().finished == {"error": 1, "length": 1}


def test_too_little_memory_halves_what_is_held(model, tokenizer, monkeypatch, caplog):
    requests = [greedy(ids(i, 6, 300), 0.5) for i in range(6)]
    real, failures = scheduler.Group.step, []

    def short_of_memory(group):
        if len(group.states) > 3:
            failures.append(len(group.states))
            raise torch.OutOfMemoryError("no")
        return real(group)

    monkeypatch.setattr(scheduler.Group, "step", short_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    found = run(Engine(model, tokenizer), requests)
    assert failures
    assert [each.tokens for each in found] == batched(model, requests, 12)
    assert "out of memory: going on with half as many tokens at once" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "prompt: there is no token"),
        ({"prompt": (5, 999)}, "no row for the token"),
        ({"prompt": (5,) * 250}, "it has 250 tokens, which with 12 new ones .* context of 256"),
        ({"lam": float("nan")}, "lam must be finite"),
        ({"lam": {"helpful": 1.0}}, "lam names 'helpful'"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf"),
        ({"logit_bias": ((999, 1.0),)}, "logit_bias: there is no token 999"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"stop": ("",)}, "stop="),
    ],
    ids=str,
)
def test_what_can_never_be_decoded_is_refused(model, tokenizer, options, message):
    with pytest.raises(DeRaError, match=message):
        Engine(model, tokenizer).submit(GenerationRequest(**{"prompt": (5,), "sampling": GREEDY, **options}))


def test_cancelled_requests_free_their_rows_in_one_step(model, tokenizer):
    engine = Engine(model, tokenizer, max_queue=3, max_rows=4)
    handles = [engine.submit(greedy(ids(i, 6, 300), 0.5)) for i in range(3)]
    with pytest.raises(QueueFull, match="as may, 3"):  # two can be computed, one waits: three do not go beside it
        engine.submit_all([greedy((5,), 0.5)] * 3)
    handles += engine.submit_all([greedy((5,), 0.5)] * 2)
    with pytest.raises(QueueFull):
        engine.submit(greedy((5,), 1.0))
    engine.step()
    assert (engine.statistics().rows, engine.statistics().waiting) == (4, 3)
    for handle in (handles[0], *handles[2:]):
        engine.cancel(handle)
    engine.step()
    assert (engine.statistics().rows, engine.statistics().waiting) == (2, 0)
    assert [handle.finish_reason for handle in handles] == ["cancelled", None, *["cancelled"] * 3]
    assert handles[0].result(0).tokens == alone(model, handles[0].request)[: len(handles[0].result(0).tokens)]


def test_close_drains_or_cancels(model, tokenizer):
    request = greedy(ids(4, 6, 300), 0.5, 40)
    with Engine(model, tokenizer) as engine:
        drained = engine.submit(request)
    assert drained.result(0).tokens == alone(model, request)
    with pytest.raises(EngineClosed):
        engine.submit(request)
    engine = Engine(model, tokenizer).start()
    handles = [engine.submit(greedy(ids(i, 6, 300), 0.5, 200)) for i in range(30)]
    next(iter(handles[0]))
    engine.close(drain=False)
    assert {handle.result(0).finish_reason for handle in handles} <= {"cancelled", "length"}
    assert handles[-1].finish_reason == "cancelled"


def test_other_threads_call_the_model_beside_it(model, tokenizer):
    request = greedy(ids(4, 6, 300), 0.5)
    expected = alone(model, request)
    with Engine(model, tokenizer) as engine:
        others = [engine.submit(greedy(ids(i, 6, 300), LAMBDAS[i % 5], 200)) for i in range(4)]
        next(iter(others[0]))
        assert alone(model, request) == expected
        assert not any(other.done for other in others), "between two of its steps"
        for other in others:
            other.cancel()


def test_events_in_an_event_loop(model, tokenizer):
    async def collect(handle):
        return [event async for event in handle]

    async def main(engine):
        handles = [engine.submit(greedy(ids(i, 6, 300), 0.5)) for i in range(4)]
        return await asyncio.gather(*map(collect, handles)), handles

    with Engine(model, tokenizer) as engine:
        all_events, handles = asyncio.run(main(engine))
    for events, handle in zip(all_events, handles, strict=True):
        assert [event.token for event in events] == handle.result(0).tokens == alone(model, handle.request)
        assert handle.created <= handle.started <= handle.first_token <= handle.finished


def test_memory_stays_flat(model, tokenizer):
    """After three times as many requests no more is held, and of a finished one no more than its place."""

    def held() -> tuple[int, int]:
        gc.collect()
        # pyrefly: ignore[deprecated]
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return len(tensors), sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    engine = Engine(model, tokenizer, max_tokens=2400)
    before, after = held(), []
    for turn in range(6):
        run(engine, [greedy(ids(100 * turn + i, 20, 300), LAMBDAS[i % 5], 1) for i in range(20)])
        after.append(held())
    assert 570 < engine.statistics().prefix_tokens <= 600
    assert after[5] == after[1]
    entries = len(engine._scheduler.prefixes._entries)
    assert entries >= 18
    assert after[5][0] - before[0] < 6 * entries, "an entry has neither a cache nor a plan of its own"


# -- prompts that begin alike ------------------------------------------------------------------------------------------


def test_a_prefix_is_found_across_lambda_by_the_branches_it_holds(model, tokenizer):
    engine = Engine(model, tokenizer)
    chat = ids(9, 30, 300)

    def cached(prompt, lam) -> int:
        request = greedy(prompt, lam, 4)
        handle = engine.submit(request)
        while engine.step():
            pass
        assert handle.result(0).tokens == alone(model, request)
        return handle.cached_tokens

    assert cached(chat, 0.0) == 0
    assert cached((*chat, 7), 1.0) == 0, "the reference's rows are of no use to the aligned model"
    assert cached((*chat, 8), 0.5) == 0, "and a mixture needs both"
    assert cached((*chat, 9), 0.0) == cached((*chat, 10), 1.0) == cached((*chat, 11), -3.0) == 30
    assert cached(chat[:20], 1.5) == 19, "the last token has to be computed"
    assert cached((*chat[:25], 3, 4, 5), 0.3) == 25


def test_a_chat_goes_on_from_its_history(model, tokenizer):
    engine = Engine(model, tokenizer)
    (first,) = run(engine, [greedy(ids(9, 12, 300), 0.5)])
    history = (*ids(9, 12, 300), *first.tokens)
    handle = engine.submit(greedy((*history, 5, 6), 0.9))
    while engine.step():
        pass
    assert handle.cached_tokens == len(history) - 1, "the last token of the answer was never read"
    assert handle.result(0).tokens == alone(model, handle.request)


def test_samples_of_one_prompt_compute_it_once(model, tokenizer):
    prompt = ids(9, 40, 300)
    engine = Engine(model, tokenizer, prefix_tokens=0)
    sampling = Sampling(max_new_tokens=6)
    run(engine, [GenerationRequest(prompt, 0.5, sample=i, sampling=sampling, ignore_eos=True) for i in range(8)])
    assert engine.statistics().prompt_tokens == 40 + 7
    assert engine.statistics().cached_tokens == 7 * 39


def test_weights_that_are_mixed_share_prefixes_of_one_lambda_alone(tiny_base, tiny_adapter, tokenizer):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights")
    engine = Engine(model, tokenizer)
    requests = [greedy((*ids(9, 30, 300), i), lam, 4) for i, lam in ((5, 0.5), (6, 0.5), (7, 0.7))]
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        while engine.step():
            pass
    assert [handle.cached_tokens for handle in handles] == [0, 30, 0]
    assert [handle.result(0).tokens for handle in handles] == [alone(model, request) for request in requests]


def test_adapters_that_change_end_what_was_computed(tiny_base, tiny_adapter, top_adapter, tokenizer):
    model = DeRaModel.from_pretrained(tiny_base, adapters={"a": tiny_adapter})
    engine = Engine(model, tokenizer)
    request = greedy(ids(9, 30, 300), {"a": 0.5})
    handle = engine.submit(request)
    engine.step()
    model.add_adapter("b", top_adapter)
    engine.step()
    assert handle.finish_reason == "error"
    assert "adapters changed" in handle.result(0).error
    both = greedy(ids(9, 30, 300), {"a": 0.5, "b": 0.7})
    (found,) = run(engine, [both])
    expected = model.generate(
        torch.tensor([both.prompt]), lam=both.lam, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens == expected[0, 30:].tolist()


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_comes_in_pieces_up_to_a_stop_string(model, tokenizer):
    prompt = tuple(tokenizer("A fox crossed the frozen river")["input_ids"])
    sampling = Sampling(seed=3, max_new_tokens=40)
    plain, whole = run(
        Engine(model, tokenizer),
        [GenerationRequest(prompt, 0.5, sampling=sampling, stream=stream) for stream in (True, False)],
    )
    assert plain.tokens == whole.tokens
    without_end = [token for token in plain.tokens if token != tokenizer.eos_token_id]
    assert plain.text == whole.text == tokenizer.decode(without_end, skip_special_tokens=True)
    assert len(plain.text) > 12
    stop = plain.text[8:11]
    for stream in (True, False):
        handle = Engine(model, tokenizer)
        request = GenerationRequest(prompt, 0.5, sampling=sampling, stop=("never", stop), stream=stream)
        (stopped,) = run(handle, [request])
        assert stopped.finish_reason == "stop"
        assert stopped.text == plain.text[: plain.text.index(stop)]
        assert stopped.tokens == plain.tokens[: len(stopped.tokens)]
    (ended,) = run(
        Engine(model, tokenizer),
        [GenerationRequest(prompt, 0.5, sampling=sampling, stop_token_ids=(plain.tokens[5],))],
    )
    assert ended.finish_reason == "stop"
    first = plain.tokens.index(plain.tokens[5])
    assert ended.tokens == plain.tokens[: first + 1]
    assert ended.text == tokenizer.decode(plain.tokens[:first], skip_special_tokens=True)


def test_a_timeout_is_told(model, tokenizer):
    handle = Engine(model, tokenizer).submit(greedy((5,), 0.5))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no event of the engine within 0\.01 s"):
        handle.result(0.01)
    assert time.monotonic() - start < 5
