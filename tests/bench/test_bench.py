"""`dera bench` on a tiny random shape: what it compares computes the same, and what it prints is what it measured."""

import json
from pathlib import Path

import pytest
import torch
from captured import EagerRecorder
from torch._dynamo.utils import counters
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

from dera_peft import DeRaError
from dera_peft.bench import measure as measuring
from dera_peft.bench import memory
from dera_peft.bench.config import BenchedModel, StepSettings
from dera_peft.bench.contenders import (
    BASE,
    BASE_TWICE,
    DERA,
    DERA_ALIGNED,
    DERA_REFERENCE,
    DERA_TOP_HALF,
    MIXTURES,
    NAMES,
    ON_OFF,
    PEFT_ACTIVE,
    TWO_MODELS,
    make_contenders,
)
from dera_peft.bench.engines import ENGINES, Captured
from dera_peft.bench.memory import measure_alone
from dera_peft.bench.report import figures, spread
from dera_peft.bench.shapes import SHAPES, read_config
from dera_peft.cli.app import app
from dera_peft.engine import mixture
from dera_peft.engine.capture import Captures

PROMPT, NEW = 6, 3
TINY = {"shape": "tiny", "dtype": "float32", "device_map": "cpu"}


@pytest.fixture(scope="module")
def contenders():
    return {one.name: one for one in make_contenders(BenchedModel(**TINY).build())}


def logits_of(contender, tokens, chunk=None):
    found = []
    measuring.decode_forced(contender, tokens, PROMPT, chunk, lambda logits: found.append(logits.clone()))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_ways_to_mix_give_the_same_logits(contenders, batch_size):
    tokens = measuring.make_tokens(512, batch_size, PROMPT + NEW, torch.device("cpu"))
    found = {name: logits_of(one, tokens) for name, one in contenders.items()}
    assert found[DERA].shape == (batch_size, NEW, 512)
    reference, aligned = found[BASE], found[PEFT_ACTIVE]
    assert (reference - aligned).abs().max() > 0.1 * reference.std(), "the adapter must do something"
    for name in MIXTURES:
        torch.testing.assert_close(found[name], 0.5 * reference + 0.5 * aligned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[DERA_REFERENCE], reference, atol=0, rtol=0)
    torch.testing.assert_close(found[DERA_ALIGNED], aligned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[BASE_TWICE], reference.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(contenders[DERA], tokens, chunk=4), found[DERA], atol=1e-5, rtol=1e-5)


def test_weights_are_counted_once_and_shared(contenders):
    base = contenders[BASE].weights_bytes
    model = contenders[DERA].passes[0].model
    adapter = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert base == sum(p.nbytes for p in model.parameters()) - adapter + sum(b.nbytes for b in model.base.buffers())
    assert contenders[DERA].weights_bytes == base + adapter
    assert contenders[TWO_MODELS].weights_bytes == 2 * base
    shared = {p.data_ptr() for p in contenders[BASE].passes[0].model.parameters()}
    assert shared <= {p.data_ptr() for p in model.parameters()}


def test_rounds_are_interleaved_and_counted(contenders):
    few = [contenders[name] for name in (BASE, BASE_TWICE, DERA, TWO_MODELS)]
    progress = []
    lists = list(measuring.measure(few, [1, 2], PROMPT, NEW, rounds=2, advance=lambda: progress.append(1)))
    assert len(lists) == 2 * (1 + 2)
    assert len(progress) == 2 * 3 * len(few)
    for timings in lists[-1]:
        assert len(timings.prefill) == 2
        assert len(timings.steps) == 2 * NEW
        assert min(timings.prefill + timings.steps) > 0
    rows = {row["contender"]: row for row in figures(lists[-1], bandwidth=1e9)}
    assert rows[BASE]["step_over_base"] == 1
    assert rows[DERA]["tokens_per_second"] == pytest.approx(2 / rows[DERA]["step_seconds"]["median"])
    assert rows[DERA]["logits_difference"] == 0, "it is the first"
    assert 0 < rows[TWO_MODELS]["logits_difference"] < 1e-4
    assert rows[BASE]["logits_difference"] is None
    # 4 layers, keys and values, 2 heads of 16, fp32, at each of the 9 tokens of 2 sequences
    assert rows[BASE]["cache_bytes"] == 4 * 2 * 2 * 16 * 4 * 9 * 2
    assert rows[DERA]["cache_bytes"] == 2 * rows[BASE]["cache_bytes"]


def test_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_the_adapter_on_the_top_half_forks_there(contenders):
    assert contenders[DERA].passes[0].model.fork_layer == 0
    assert contenders[DERA_TOP_HALF].passes[0].model.fork_layer == 2
    source = BenchedModel(**TINY, top=0.5)
    (contender,) = make_contenders(source.build(), [DERA])
    assert contender.passes[0].model.fork_layer == 2


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_quantized_shape(quantization):
    pytest.importorskip("bitsandbytes")
    source = BenchedModel(**{**TINY, "dtype": "bfloat16"}, quantization=quantization)
    base, dera = make_contenders(source.build(), [BASE, DERA])
    tokens = measuring.make_tokens(512, 2, PROMPT + NEW, torch.device("cpu"))
    assert (logits_of(dera, tokens) - logits_of(base, tokens)).abs().max() > 0
    head = base.passes[0].model.lm_head.weight
    linear = base.passes[0].model.model.layers[0].mlp.up_proj.weight
    assert head.dtype == torch.bfloat16
    assert linear.quant_state.quant_type == quantization
    plain = make_contenders(BenchedModel(**{**TINY, "dtype": "bfloat16"}).build(), [BASE])[0].passes[0].model
    assert not any(tensor.is_meta for tensor in base.tensors)
    assert torch.equal(base.passes[0].model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(base.passes[0].model.model.norm.weight, plain.model.norm.weight)
    assert base.passes[0].model.model.embed_tokens.weight is head, "they are tied"
    assert head.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_shapes_have_their_published_size(shape):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(read_config(shape, 128)).num_parameters()
    billions = {"llama-8b": 8.03, "llama-1b": 1.236, "qwen3-0.6b": 0.596, "smollm2-135m": 0.1345, "tiny": 0.00018}
    assert count / 1e9 == pytest.approx(billions[shape], rel=0.01)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


SMALL = ("--shape", "tiny", "--prompt", "4", "--new", "2", "--rounds", "1", "--batch", "1,2", "--dtype", "float32")


def test_the_command(tmp_path):
    chart = tmp_path / "charts" / "bench.png"
    result = run(*SMALL, "--json", "--plot", str(chart))
    found = json.loads(result.stdout)
    assert [(row["batch"], row["contender"]) for row in found["results"]] == [(b, n) for b in (1, 2) for n in NAMES]
    assert found["complete"]
    assert found["copy_bytes_per_second"] > 0
    assert found["settings"]["shape"] == "tiny"
    assert chart.read_bytes().startswith(b"\x89PNG")
    table = run(*SMALL, "--only", BASE, "--only", DERA, "--only", TWO_MODELS).stdout
    assert all(name in table for name in (BASE, DERA, TWO_MODELS))
    assert "ms/step" in table
    assert "equal within" in table


def test_a_config_and_the_command_line_before_it(tmp_path):
    config = tmp_path / "bench.yaml"
    config.write_text(f"{{shape: tiny, prompt: 4, new: 3, rounds: 1, batch: [1, 2], only: {BASE!r}}}")
    found = json.loads(run("--config", str(config), "--new", "2", "--json").stdout)
    assert [(row["batch"], row["contender"]) for row in found["results"]] == [(1, BASE), (2, BASE)]
    assert (found["settings"]["prompt"], found["settings"]["new"]) == (4, 2)
    config.write_text("{shape: tiny, prompt: 4, new: 2, samples: 1, prompts: 2, lambdas: [0.5]}")
    assert json.loads(run("sweep", "--config", str(config), "--json").stdout)["settings"]["lambdas"] == [0.5]
    config.write_text("{shape: tiny, pormpt: 4}")
    with pytest.raises(DeRaError, match="'pormpt' is not a key of dera bench; do you mean 'prompt'"):
        run("--config", str(config))


def test_a_loaded_adapter(tiny_base, tiny_adapter):
    options = ("--prompt", "4", "--new", "2", "--rounds", "1", "--batch", "2", "--only", DERA, "--only", TWO_MODELS)
    found = json.loads(run("--base", str(tiny_base), "--adapter", str(tiny_adapter), *options, "--json").stdout)
    assert found["results"][1]["logits_difference"] < 1e-4


def test_interrupted_it_shows_what_was_measured(monkeypatch):
    measure = measuring.measure

    def two_rounds_of_the_first(*arguments, **options):
        for count, timings in enumerate(measure(*arguments, **options)):
            yield timings
            if count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", two_rounds_of_the_first)
    result = run(*SMALL[:-6], "--rounds", "3", "--batch", "1,2", "--only", DERA, "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert not found["complete"]
    assert [row["batch"] for row in found["results"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--shape"),
        (("--shape", "tiny", "--adapter", "x"), "--shape"),
        (("--shape", "huge"), "huge"),
        (("--adapter", "x", "--top", "0.5"), "--top"),
        (("--shape", "tiny", "--top", "2"), "--top"),
        (("--shape", "tiny", "--batch", "0"), "--batch"),
        (("--shape", "tiny", "--quantization", "int8"), "int8"),
        (("--shape", "tiny", "--only", "nothing"), "nothing"),
        (("--shape", "tiny", "--device-map", "auto"), "--device-map auto: what is measured is on one device"),
        (("--shape", "tiny", "--device-map", "cuda:9"), "device_map='cuda:9': there is no such device here"),
        (("--shape", "tiny", "sweep"), "options before 'sweep' have no effect"),
        (("sweep",), "--shape"),
    ],
)
def test_refused(arguments, said):
    with pytest.raises(DeRaError, match=said):
        run(*arguments)


def test_a_sweep_against_separate_calls():
    options = (
        "--shape",
        "tiny",
        "--lambda",
        "0,0.5",
        "--samples",
        "2",
        "--prompts",
        "2",
        "--prompt",
        "4",
        "--new",
        "2",
    )
    found = json.loads(run("sweep", *options, "--json").stdout)
    assert found["ratio"] == pytest.approx(found["seconds"]["sweep"]["median"] / found["seconds"]["separate"]["median"])
    assert "separate calls" in run("sweep", *options).stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_alone():
    found = measure_alone(StepSettings(**TINY, prompt=PROMPT, new=NEW, threads=1), DERA, 1)
    assert 0 < found["libraries"] <= found["model"] <= found["peak"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"signal 9 ended it \(Killed\)"),
        ("raise SystemExit(3)", "it ended with exit code 3"),
        ("raise ValueError('no such shape')", "ValueError: no such shape"),
    ],
)
def test_why_a_process_measured_alone_failed(monkeypatch, code, said):
    start = memory.subprocess.run
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **options: start([command[0], "-c", code], **options))
    with pytest.raises(DeRaError, match=f"DeRa λ=0.5, measured alone, failed: {said}"):
        measure_alone(StepSettings(shape="tiny"), "DeRa λ=0.5", 1)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_static_engine(monkeypatch, quantization):
    """Traced whole (`fullgraph` raises at a graph break), run without a compiler; tests of `generate` compile it."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, mode, **kwargs: compile_(forward, backend="eager", **kwargs))
    names = [BASE, DERA]
    source = BenchedModel(**TINY, layers=1, quantization=quantization)
    tokens = measuring.make_tokens(512, 2, PROMPT + NEW, torch.device("cpu"))
    peft_model = source.build()
    for static, eager in zip(
        make_contenders(peft_model, names, "static"), make_contenders(peft_model, names), strict=True
    ):
        for _ in range(2):  # the second time over the first one's cache
            torch.testing.assert_close(logits_of(static, tokens), logits_of(eager, tokens), atol=1e-5, rtol=1e-5)
        assert static.cache_bytes == eager.cache_bytes


class EagerSteps:
    """In place of CUDA graphs of a plain model: a replay computes the step on the same tensors."""

    device_type = "cpu"

    def start(self, device):
        pass

    def warm_up(self, step, device):
        return step()

    def record(self, step, device):
        output = CausalLMOutput(logits=torch.empty(2, 1, 512))
        return lambda: output.logits.copy_(step().logits), output


def test_the_captured_engine(monkeypatch):
    """What is around the recordings; of CUDA graphs, with --gpu, the logits are compared in the same way."""
    monkeypatch.setitem(ENGINES, "captured", lambda: Captured(EagerSteps))
    monkeypatch.setattr(mixture, "Captures", lambda: Captures(EagerRecorder()))
    peft_model = BenchedModel(**TINY).build()
    tokens = measuring.make_tokens(512, 2, PROMPT + 6, torch.device("cpu"))
    captured, eager = (make_contenders(peft_model, [BASE, DERA], engine) for engine in ("captured", "dynamic"))
    for one, other in zip(captured, eager, strict=True):
        for _ in range(2):  # the second time all of its steps are replayed
            torch.testing.assert_close(logits_of(one, tokens), logits_of(other, tokens), atol=1e-5, rtol=1e-5)
    (((_, step),), ((cache, _),)) = (one._kept[2, PROMPT + 6] for one in captured)
    assert step.replay is not None
    assert [each.replay is not None for each in cache.recordings.values()] == [True]
    captured[1].prefill(tokens[:, :PROMPT], PROMPT + 6)
    captured[1].passes[0].model._captures.unfit = "it can't be"
    with pytest.raises(DeRaError, match="--engine captured: it can't be"):
        captured[1].step(tokens[:, :1])


def test_the_captured_engine_needs_a_gpu():
    (contender,) = make_contenders(BenchedModel(**TINY).build(), [BASE], "captured")
    with pytest.raises(DeRaError, match="--engine captured: the model is on cpu"):
        contender.prefill(torch.ones(1, 4, dtype=torch.long), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_captured_engine_on_a_gpu(quantization):
    source = BenchedModel(shape="tiny", dtype="float32", device_map="cuda", quantization=quantization)
    peft_model, names = source.build(), [BASE, BASE_TWICE, DERA, DERA_REFERENCE, DERA_ALIGNED]
    tokens = measuring.make_tokens(512, 2, PROMPT + 6, torch.device("cuda"))
    captured, eager = (make_contenders(peft_model, names, engine) for engine in ("captured", "dynamic"))
    for one, other in zip(captured, eager, strict=True):
        for _ in range(2):
            found = logits_of(one, tokens)
            torch.testing.assert_close(found, logits_of(other, tokens), atol=1e-4, rtol=1e-5)


@torch._dynamo.config.patch(recompile_limit=2)  # enough for one batch size, and not for two
def test_no_step_of_the_static_engine_is_compiled_in_a_measured_round(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, mode, **kwargs: compile_(forward, backend="eager", **kwargs))
    source = BenchedModel(**TINY, layers=1)
    contenders = make_contenders(source.build(), [DERA, DERA_ALIGNED, ON_OFF], "static")
    before = counters["stats"]["unique_graphs"]
    graphs = []  # after the warm-up and the round of each batch size
    for _ in measuring.measure(contenders, [1, 2], prompt=4, new=2, rounds=1):
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs == [2, 2, 4, 4]
