"""The settings of what decodes: what would have no effect, and what an engine can't do, is refused by name."""

import pytest

from dera_peft.cli.generate import GenerateSettings
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.evaluate import SweepConfig
from dera_peft.evaluate.arms import make_arms
from dera_peft.evaluate.check import check
from dera_peft.remote.settings import RemoteSettings, read_arguments

URL = {"endpoint": "http://127.0.0.1:9"}
VLLM = {"engine": "vllm"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concurrency": 4}, "concurrency=4 has no effect: --concurrency is for --engine vllm or --endpoint"),
        ({"timeout": 5.0, **VLLM}, "timeout=5.0 has no effect"),
        ({"vllm_python": "python", **URL, **VLLM}, "vllm_python=.* has no effect: .* for --engine vllm without"),
        ({"vllm_arguments": {"block_size": 32}}, "--vllm-argument is for --engine vllm without --endpoint"),
        ({"vllm_arguments": {"model": "x"}, **VLLM}, "'model' is said by other settings: --base"),
        ({"endpoint": "localhost:8000"}, "is not the address of a server"),
        ({"endpoint": "http://host:x"}, "is not the address of a server"),
        ({"endpoint": "http://me:secret@host"}, "put a key into DERA_API_KEY"),
        ({"engine": "sglang"}, "choose one of dera, vllm"),
    ],
)
def test_settings_without_effect(settings, said):
    with pytest.raises(DeRaError, match=said) as caught:
        RemoteSettings(**settings)
    assert "secret" not in str(caught.value)


def test_an_address_is_that_of_the_server():
    for text in ("https://h:1/", "https://h:1/v1", " https://h:1/v1/ "):
        assert RemoteSettings(endpoint=text).endpoint == "https://h:1"
    assert RemoteSettings(endpoint="http://h/dera/v1").endpoint == "http://h/dera"


def test_arguments_are_written_as_in_yaml():
    texts = ["tensor_parallel_size=2", "enforce_eager=true", "dtype=auto", "compilation_config={level: 0}"]
    assert read_arguments(texts) == {
        "tensor_parallel_size": 2, "enforce_eager": True, "dtype": "auto", "compilation_config": {"level": 0}
    }  # fmt: skip


def test_what_of_the_engine_is_part_of_a_run():
    greedy, drawn = Sampling(temperature=0.0), Sampling()
    here, server, vllm = RemoteSettings(), RemoteSettings(**URL), RemoteSettings(**VLLM, **URL)
    assert here.fingerprint_of_engine(drawn) == server.fingerprint_of_engine(drawn) == {}, "the same random numbers"
    assert vllm.fingerprint_of_engine(greedy) == {}
    assert vllm.fingerprint_of_engine(drawn) == {"engine": "vllm"}
    given = RemoteSettings(**VLLM, vllm_arguments={"tensor_parallel_size": 2, "quantization": "fp8"}, concurrency=3)
    assert given.fingerprint_of_engine(greedy) == {"vllm_arguments": {"quantization": "fp8"}}


@pytest.mark.parametrize("engine", [URL, VLLM], ids=["endpoint", "vllm"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"principle": "Be brief."}, "principle and reference_system can't be had with --"),
        ({"particles": 4}, "particles=4 can't be had with --"),
        ({"stream": True}, "--stream shows tokens of a model in this process"),
        ({"batch_size": 4}, "batch_size=4 is of a model in this process"),
        ({"device_map": "cpu"}, "device_map='cpu' is of a model in this process"),
    ],
)
def test_what_is_of_a_model_in_this_process(engine, settings, said):
    with pytest.raises(DeRaError, match=said):
        GenerateSettings(prompt=("x",), adapter="a", **engine, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"combine": "aad:0.1"}, "combine='aad:0.1' can't be had with --engine vllm"),
        ({"lambda_schedule": {0: 2.0, 5: 1.0}}, "lambda_schedule=.* can't be had"),
        ({"temperature": 0.005}, "temperature=0.005: vLLM takes 0"),
    ],
)
def test_what_vllm_can_not_do(settings, said):
    with pytest.raises(DeRaError, match=said):
        GenerateSettings(prompt=("x",), adapter="a", **VLLM, **settings)
    GenerateSettings(prompt=("x",), adapter="a", **URL, **settings)  # a server of dera serve can


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        (URL, {"arms": [{"mixing": "weights"}]}, r"arms\[0\]: mixing='weights' can't be had with --endpoint http"),
        (URL, {"arms": [{"particles": 2}]}, r"arms\[0\]: particles=2 can't be had"),
        (URL, {"arms": [{"combine": "jsd"}, {"adapter": "."}]}, r"arms\[1\]: adapter='.' is another model"),
        (VLLM, {"arms": [{"combine": "jsd"}]}, r"arms\[0\]: combine='jsd' can't be had with --engine vllm"),
        (VLLM, {"principle": "Be brief."}, "principle and reference_system can't be had"),
        (VLLM, {"quantization": "int8"}, "quantization='int8' can't be had in vLLM"),
        (VLLM, {"vllm_arguments": {"quantization": "fp8"}}, "a sweep scores with the model of this process"),
        (VLLM, {"base_arguments": {"attn_implementation": "sdpa"}}, "'attn_implementation' is of transformers'"),
        (VLLM, {"temperature": 0.005}, "vLLM takes 0"),
    ],
)
def test_arms_of_a_sweep_are_refused_before_anything_is_decoded(engine, settings, said, tiny_base, tiny_adapter):
    def config():
        return SweepConfig(prompts=["x"], base=str(tiny_base), adapter=str(tiny_adapter), **engine, **settings)

    for run in (make_arms, check):
        with pytest.raises(DeRaError, match=said):
            run(config())
