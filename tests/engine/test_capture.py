"""Captured steps against eager ones over the same static cache, bit for bit; and what can't be captured."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from captured import LAM, OPTIONS, Counted, EagerRecorder, assert_bit_equal, padded, run, watch
from compatibility import BASES, ENCODER_DECODERS, LINEAR, VOCABULARY
from tiny_bases import adapt, make_base
from tiny_models import make_adapter, make_tokenizer
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from dera_peft import DeRaModel
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine import capture
from dera_peft.engine.capture import CapturedCache, Captures
from dera_peft.engine.cuda_graph import CannotRecord

CPU = torch.device("cpu")
LLAMA = BASES[0]


def make_model(**options) -> DeRaModel:
    return DeRaModel.from_peft(adapt(make_base(LLAMA), **{"target_modules": LINEAR, **options}))


@pytest.fixture(scope="module")
def llama(device) -> tuple[DeRaModel, Counted, dict]:
    model = make_model()
    return model, watch(model, device), padded(device)


class Shift:
    """A logits processor: the token after the last one is more likely."""

    def __call__(self, input_ids, scores):
        return scores.scatter_add(1, (input_ids[:, -1:] + 1) % VOCABULARY, torch.full_like(scores[:, :1], 4.0))


class Kept(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.values.append("end")


FEATURES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "processors": {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "logits_processor": LogitsProcessorList([Shift()]),
    },
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 4},
    "chunks of one token": {"prefill_chunk_size": 1},
    "branches": {"output_branches": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_generate(llama, feature):
    model, recorder, inputs = llama
    before = recorder.replays
    assert_bit_equal(model, **inputs, lam=LAM, **FEATURES[feature])
    assert recorder.replays - before >= 9


def test_sampled_tokens_depend_on_the_seed_alone(llama):
    model, _, inputs = llama
    options = {**OPTIONS, **inputs, "lam": LAM, "do_sample": True, "capture": True}

    def sample(seed: int) -> list:
        torch.manual_seed(seed)
        return model.generate(**options).tolist()

    assert sample(1) == sample(1) != sample(2)


def test_ends(llama):
    """Finished sequences are filled up, and a text ends where a stop string does."""
    model, recorder, inputs = llama
    plain = assert_bit_equal(model, **inputs, lam=LAM)
    end = int(plain[0, inputs["input_ids"].shape[1] + 4])
    ended = assert_bit_equal(model, **inputs, lam=LAM, eos_token_id=end)
    assert ended.tolist() != plain.tolist()
    tokenizer = make_tokenizer()
    one = {name: value[1:2] for name, value in inputs.items()}
    text = tokenizer.decode(model.generate(**one, lam=0.5, capture=False, **OPTIONS)[0, 6:])
    stop = {"stop_strings": text[4:7], "tokenizer": tokenizer}
    assert assert_bit_equal(model, **one, lam=0.5, **stop).shape[1] < 18
    assert recorder.replays > 0


def test_a_streamer_gets_every_token(llama):
    model, _, inputs = llama
    one = {name: value[1:2] for name, value in inputs.items()}
    streams = []
    for captured in (True, False):
        streamer = Kept()
        model.generate(**one, lam=0.5, streamer=streamer, capture=captured, **OPTIONS)
        streams.append(streamer.values)
    assert len(streams[0]) == 14
    assert streams[0] == streams[1]


def test_another_strength_replays_the_same_graph(device):
    model = make_model()
    recorder, inputs = watch(model, device), padded(device)
    texts = {
        tuple(lam): assert_bit_equal(model, **inputs, lam=lam).tolist()
        for lam in ([0.5, 0.5, 0.5, 0.5], [0.2, 0.7, 1.5, -1.0], [3.0, 2.0, 0.1, 0.9])
    }
    assert (recorder.recordings, recorder.replays) == (1, 9 + 11 + 11)
    assert len({str(text) for text in texts.values()}) == 3
    for lam in ([0.0] * 4, [1.0] * 4, LAM):  # other branches
        assert_bit_equal(model, **inputs, lam=lam)
    assert recorder.recordings == 4
    assert_bit_equal(model, **inputs, lam=[0.5, 0.5, 0.5, 0.5])
    assert recorder.recordings == 4, "the first one is still there"


def test_a_callers_plan_is_left_as_it_is(llama):
    model, _, inputs = llama
    plan = model.plan([0.4] * 4, 4)
    first = run(model, True, **inputs, lam=plan)[0]
    run(model, True, **inputs, lam=[0.9] * 4)
    assert run(model, True, **inputs, lam=plan)[0].tolist() == first.tolist()
    assert plan.lam.tolist() == [[0.4]] * 4


def test_weights_that_are_mixed(device):
    model = DeRaModel.from_peft(adapt(make_base(LLAMA), target_modules=LINEAR), mixing="weights")
    recorder, inputs = watch(model, device), padded(device)
    for lam in (LAM, [0.1, 0.9, 2.0, -1.0]):
        assert_bit_equal(model, **inputs, lam=lam)
    assert recorder.recordings == 1
    assert_bit_equal(model, **inputs, lam=0.0)
    assert recorder.recordings == 2, "no adapter's product is computed"


def test_several_adapters(tiny_base, tiny_adapter, tmp_path, device):
    adapters = {
        "a": tiny_adapter,
        "b": make_adapter(tiny_base, tmp_path / "b", seed=5),
        "c": make_adapter(tiny_base, tmp_path / "c", seed=6, layers_to_transform=[1, 3]),
    }
    sft = make_adapter(tiny_base, tmp_path / "sft", seed=7)
    model = DeRaModel.from_pretrained(tiny_base, adapters=adapters, reference=sft)
    recorder, inputs = watch(model, device), padded(device)
    assert_bit_equal(model, **inputs, lam={"a": 0.5, "b": 0.25, "c": [0.1, 0.2, 0.3, 0.4]})
    assert_bit_equal(model, **inputs, lam={"a": 0.3, "b": 0.3, "c": 0.3})
    assert recorder.recordings == 1
    assert_bit_equal(model, **inputs, lam={"a": [0.0, 1.0, 0.5, 0.2], "b": [0.0, 0.0, 0.5, 0.0], "c": 0.0})
    assert recorder.recordings == 2


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_four_bits(tiny_base, tiny_adapter, device, quantization):
    pytest.importorskip("bitsandbytes")
    model = DeRaModel.from_pretrained(
        tiny_base, tiny_adapter, quantization=quantization, dtype=torch.float32, device_map=str(device)
    )
    recorder = watch(model, device)
    assert_bit_equal(model, **padded(device), lam=LAM)
    assert recorder.replays == 9


def test_in_bfloat16(tiny_base, top_adapter, device):
    model = DeRaModel.from_pretrained(tiny_base, top_adapter, dtype=torch.bfloat16)
    recorder = watch(model, device)
    assert model.fork_layer == 2
    assert_bit_equal(model, **padded(device), lam=LAM)
    assert recorder.replays == 9


def test_requests_in_batches(tiny_base, tiny_adapter, device):
    """A shared prompt is computed once and goes on in a static cache; each batch is as without captured steps."""
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    model.generation_config.eos_token_id = None
    recorder = watch(model, device)
    prompts = [list(range(5, 5 + length)) for length in (9, 4, 6)]
    requests = [Request(i, lam, sample) for i in range(3) for lam in (0.0, 0.5, 1.2) for sample in range(2)]
    found = []
    for model.capture in (True, False):
        batches = decode(model, make_tokenizer(), prompts, requests, Sampling(max_new_tokens=10), batch_size=6)
        found.append({each.request: each.tokens for batch in batches for each in batch})
    assert found[0] == found[1]
    assert recorder.replays >= 3 * 7
    assert {len(tokens) for tokens in found[0].values()} == {10}


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_the_cache_that_is_returned_goes_on(llama):
    model, _, inputs = llama
    whole = model.generate(**inputs, lam=LAM, capture=False, **{**OPTIONS, "max_new_tokens": 20})
    half = model.generate(**inputs, lam=LAM, capture=True, return_dict_in_generate=True, **OPTIONS)
    model.generate(**inputs, lam=[0.5] * 4, capture=True, **OPTIONS)  # in the pool's cache
    model.generate(**inputs, lam=LAM, capture=True, **OPTIONS)
    assert type(half.past_key_values) is DynamicCache
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(4, 12)], dim=1)
    options = {**OPTIONS, "max_new_tokens": 8, "attention_mask": mask, "past_key_values": half.past_key_values}
    assert model.generate(half.sequences, lam=LAM, capture=False, **options).tolist() == whole.tolist()


def test_few_caches_are_kept(device, monkeypatch):
    model = make_model()
    watch(model, device)
    ids = padded(device)["input_ids"][1:2]
    for new in range(70, 70 + 64 * 10, 64):
        model.generate(ids, lam=0.5, capture=True, **{**OPTIONS, "max_new_tokens": 5, "max_cache_len": new})
    assert [cache.length for _, cache in model._captures._idle] == [128 + 64 * n for n in range(2, 10)]
    monkeypatch.setattr(capture, "KEPT_BYTES", 0)
    model.generate(ids, lam=0.5, capture=True, **OPTIONS)
    assert not model._captures._idle


def test_memory_is_given_back(device):
    model = make_model()
    watch(model, device)
    inputs = padded(device)

    def use() -> weakref.ref:
        model.generate(**inputs, lam=LAM, capture=True, **OPTIONS)
        return weakref.ref(model._captures._idle[0][1])

    def held() -> int:
        return torch.cuda.memory_allocated() if device.type == "cuda" else 0

    cache = use()
    assert cache() is not None
    with_cache = held()
    model.release_captures()
    if device.type == "cpu":
        gc.collect()  # the stand-in's recording holds its cache
    assert cache() is None
    without_cache = held()
    assert device.type == "cpu" or without_cache < with_cache
    for _ in range(3):
        use()
        model.release_captures()
    if device.type == "cuda":
        assert held() == without_cache
    model.unwrap()


def test_too_little_memory_frees_the_idle_caches(llama, monkeypatch):
    model, _, inputs = llama
    model.generate(**inputs, lam=LAM, capture=True, **OPTIONS)
    assert model._captures._idle

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(DeRaModel, "_sample", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(**inputs, lam=LAM, capture=True, **OPTIONS)
    assert not model._captures._idle
    assert_bit_equal(model, **inputs, lam=LAM)


def test_a_model_that_changed_is_recorded_anew(device):
    model = make_model()
    recorder, inputs = watch(model, device), padded(device)
    texts = [assert_bit_equal(model, **inputs, lam=LAM)]
    model.base.to(torch.float64)  # moves its weights
    texts.append(assert_bit_equal(model, **inputs, lam=LAM))
    model.joins_before_head = False
    texts.append(assert_bit_equal(model, **inputs, lam=LAM))
    for module in model.adapted:
        module.module.scaling["default"] *= 2
    texts.append(assert_bit_equal(model, **inputs, lam=LAM))
    assert recorder.recordings == 4
    assert texts[-1].tolist() != texts[0].tolist()


def test_a_call_in_inference_mode_leaves_nothing_to_others(llama):
    """Its tensors can't be written to outside."""
    model, recorder, inputs = llama
    model.release_captures()
    with torch.inference_mode():
        assert_bit_equal(model, **inputs, lam=LAM)
    before = recorder.recordings
    assert_bit_equal(model, **inputs, lam=LAM)
    assert recorder.recordings == before + 1
    with torch.inference_mode():
        assert_bit_equal(model, **inputs, lam=LAM)
    assert recorder.recordings == before + 1


def test_weights_trained_in_place_are_read(llama):
    model, recorder, inputs = llama
    run(model, True, **inputs, lam=LAM)
    before = recorder.recordings
    weight = model.base.model.layers[1].mlp.up_proj.lora_B["default"].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    changed = assert_bit_equal(model, **inputs, lam=LAM)
    with torch.no_grad():
        weight.copy_(kept)
    assert recorder.recordings == before
    assert changed.tolist() != assert_bit_equal(model, **inputs, lam=LAM).tolist()


# -- what can't be captured --------------------------------------------------------------------------------------------

REFUSED = {
    "beams": ({"num_beams": 3}, "num_beams=3 moves the cache's rows"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "computes several tokens in a step"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "a dynamic cache": ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_ways_to_decode_stay_eager(llama, case, caplog):
    model, recorder, inputs = llama
    options, reason = REFUSED[case]
    if case == "prompt lookup":
        inputs = {name: value[1:2] for name, value in inputs.items()}
    options = {**OPTIONS, **inputs, "lam": 0.5, **options}
    expected = model.generate(**options, capture=False).tolist()
    before = recorder.replays
    for _ in range(2):
        assert model.generate(**options, capture=True).tolist() == expected
    assert recorder.replays == before
    said = [record for record in caplog.records if reason in record.message]
    assert [record.levelno for record in said] == [logging.WARNING]


def test_a_cache_of_the_callers_stays_eager(llama, caplog):
    model, recorder, inputs = llama
    before = recorder.replays
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        options = {**OPTIONS, **inputs, "lam": LAM, "past_key_values": cache, "disable_compile": True}
        expected = model.generate(**inputs, lam=LAM, capture=False, **OPTIONS)
        assert model.generate(**options, capture=True).tolist() == expected.tolist()
        assert cache.get_seq_length() == 17
    assert recorder.replays == before
    assert "past_key_values is a cache of the caller's" in caplog.text


def cases_of_models():
    def in_training(model):
        model.base.train()

    def with_hook(model):
        model.base.model.layers[2].register_forward_hook(lambda *_: None)

    def in_int8(model):
        model.is_loaded_in_8bit = True

    def in_autocast(model):
        generate = model.generate

        def in_context(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return generate(*args, **kwargs)

        model.generate = in_context

    return [
        (in_autocast, "autocast"),
        (in_training, "in training mode"),
        (with_hook, "hooks on model.layers.2"),
        (in_int8, "LLM.int8()"),
    ]


@pytest.mark.parametrize(("change", "reason"), cases_of_models(), ids=lambda value: getattr(value, "__name__", ""))
def test_models_that_stay_eager(change, reason, caplog):
    model = make_model()
    recorder, inputs = watch(model, CPU), padded(CPU)
    change(model)
    expected = model.generate(**inputs, lam=LAM, capture=False, **OPTIONS).tolist()
    assert model.generate(**inputs, lam=LAM, capture=True, **OPTIONS).tolist() == expected
    assert reason in caplog.text
    assert recorder.replays == 0


def test_attention_that_makes_masks_of_its_own_stays_eager(llama, monkeypatch):
    model, _, _ = llama
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    assert "flex_attention" in model.why_not_captured()


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "mpt", "t5"])
def test_architectures_that_stay_eager(name, device, caplog):
    base = next(base for base in [*BASES, *ENCODER_DECODERS] if base.model_type == name)
    task = {"task_type": "SEQ_2_SEQ_LM"} if base in ENCODER_DECODERS else {}
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, **task))
    recorder, inputs = watch(model, device), padded(device)
    expected = model.generate(**inputs, lam=LAM, capture=False, **OPTIONS).tolist()
    assert model.generate(**inputs, lam=LAM, capture=True, **OPTIONS).tolist() == expected
    assert "decoding steps are not captured as CUDA graphs: " in caplog.text
    assert recorder.replays == 0


def test_offloaded_layers_stay_eager(tiny_base, tiny_adapter, tmp_path, caplog):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 2 else "cpu" for index in range(4)}
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, device_map=places, offload_folder=tmp_path)
    model._captures = Captures(Counted(EagerRecorder()))
    expected = model.generate(**padded(CPU), lam=LAM, capture=False, **OPTIONS).tolist()
    assert model.generate(**padded(CPU), lam=LAM, capture=True, **OPTIONS).tolist() == expected
    assert "offloaded" in caplog.text


def test_without_a_gpu_nothing_is_captured_and_only_who_asks_hears_of_it(tiny_base, tiny_adapter, caplog):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, capture=True, device_map=CPU)
    assert model.capture is True
    expected = model.generate(**padded(CPU), lam=LAM, capture=False, **OPTIONS)
    assert not caplog.records
    assert model.generate(**padded(CPU), lam=LAM, **OPTIONS).tolist() == expected.tolist()
    assert [record.message for record in caplog.records] == [
        "decoding steps are not captured as CUDA graphs: the model is on cpu"
    ]


def test_steps_are_captured_where_the_device_allows_it_unless_a_caller_says_no(llama, caplog):
    model, recorder, inputs = llama
    before = recorder.replays
    model.generate(**inputs, lam=LAM, capture=False, **OPTIONS)
    assert recorder.replays == before
    model.generate(**inputs, lam=LAM, **OPTIONS)
    assert recorder.replays > before
    recorder.device_type, before = "another", recorder.replays
    caplog.clear()
    with caplog.at_level("INFO"):
        model.generate(**inputs, lam=LAM, **OPTIONS)
    assert recorder.replays == before
    assert not caplog.records, "nobody asked"
    recorder.device_type = model.device.type


def break_layer(model: DeRaModel, before_forward) -> None:
    """Has something done in the middle of each forward pass, without a hook."""
    layer = model.base.model.layers[2].mlp
    forward = layer.forward

    def changed(x):
        before_forward(layer, x)
        return forward(x)

    layer.forward = changed


def sliding_model(window: int = 4) -> DeRaModel:
    """Of a base with layers that count on the host: mistral, its window full from the start or later."""
    base = next(base for base in BASES if base.model_type == "mistral")
    base = replace(base, settings={"sliding_window": window})
    return DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets))


def test_a_step_that_changes_the_host_stays_eager(device, caplog):
    model = sliding_model()
    recorder, inputs = watch(model, device), padded(device)

    def count(layer, x):
        layer.calls = getattr(layer, "calls", 0) + 1

    break_layer(model, count)
    assert_bit_equal(model, **inputs, lam=LAM)
    assert_bit_equal(model, **inputs, lam=LAM)
    assert (recorder.recordings, recorder.replays) == (1, 0)
    assert "a step changes model.layers.2.mlp.calls on the host" in caplog.text.replace("base.", "")


def test_a_recording_that_fails_leaves_nothing_behind(caplog):
    model = sliding_model()
    recorder, inputs = watch(model, CPU), padded(CPU)

    def refuse(step, device):
        EagerRecorder().record(step, device)  # on the host it has run: the layers' counters have advanced
        raise CannotRecord("CUDA refuses")

    recorder.record = refuse
    assert_bit_equal(model, **inputs, lam=LAM)
    assert "CUDA refuses" in caplog.text
    assert model._captures.unfit == "CUDA refuses"

    del recorder.record
    assert_bit_equal(model, **inputs, lam=LAM)
    assert recorder.replays == 0, "it is not tried again"
    model.base.to(torch.float64)
    assert_bit_equal(model, **inputs, lam=LAM)
    assert recorder.replays == 9, "unless the model has changed"


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_stays_eager(device, caplog):
    model = sliding_model()
    recorder, inputs = watch(model, device), padded(device)
    break_layer(model, lambda layer, x: x.sum().item())
    assert_bit_equal(model, **inputs, lam=LAM)
    assert recorder.recordings == 0
    assert "a step waits for the device at" in caplog.text
    assert "test_capture.py" in caplog.text


@pytest.mark.gpu
def test_a_capture_that_cuda_refuses_leaves_nothing_behind(device, caplog):
    model = sliding_model()
    recorder, inputs = watch(model, device), padded(device)

    def wait(layer, x):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    break_layer(model, wait)
    assert_bit_equal(model, **inputs, lam=LAM, do_sample=True)
    assert recorder.recordings == 0
    assert "CUDA refuses to record a step" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    other = sliding_model()
    recorder = watch(other, device)
    assert_bit_equal(other, **inputs, lam=LAM, do_sample=True)
    assert recorder.replays == 9


def test_the_stand_in_notices_a_layer_that_branches_on_the_host(monkeypatch):
    """Else it could not tell whether a sliding window is safe to capture."""
    model = sliding_model(window=12)
    watch(model, CPU)
    monkeypatch.setattr(capture.SlidingLayer, "is_full", False)
    with pytest.raises(IndexError):  # one recording is replayed beyond the window
        assert_bit_equal(model, **padded(CPU), lam=LAM)


def test_the_pool_forgets_a_cache_that_failed(llama):
    model, _, inputs = llama
    model._captures.clear()

    def fail(input_ids, scores):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        model.generate(**inputs, lam=LAM, capture=True, logits_processor=LogitsProcessorList([fail]), **OPTIONS)
    assert not model._captures._idle
    assert model._captures.current is None
    assert isinstance(model.captured_cache(model.plan(0.5, 4), 20), CapturedCache | None)
