"""What FSDP is asked for, and can't do; the sharded runs themselves are in test_processes.py and fsdp_check.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from bitsandbytes.nn import Linear4bit
from fsdp2_on_cpu import LAUNCHED
from small_runs import store_quantized, train

from dera_peft import DeRaError
from dera_peft.checkpoint.devices import join_processes
from dera_peft.training import sharding
from dera_peft.training.sft_model import find_sft_model
from dera_peft.training.sharding import check_sharding, shard_quantized
from dera_peft.training.trainer import DPOConfig


@pytest.fixture
def on_gpus(monkeypatch) -> None:
    """This process seems to be one of several that have a GPU each."""
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(sharding, "PartialState", lambda: state)


def test_where_it_is_not_asked_for_nothing_is_sharded(on_gpus):
    assert check_sharding(DPOConfig(optim="paged_adamw_32bit", precompute_ref_log_probs=True)) is None
    assert check_sharding(DPOConfig(fsdp="false")) is None


@pytest.mark.parametrize("asked", [{"fsdp": "true"}, {"fsdp": True, "fsdp_config": {"version": 2}}])
def test_by_arguments(asked, on_gpus):
    assert check_sharding(DPOConfig(**asked)) == "fsdp2"


def test_by_the_launcher(on_gpus, monkeypatch):
    monkeypatch.setenv(LAUNCHED, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert check_sharding(DPOConfig()) == "fsdp2"
    with monkeypatch.context() as patch:
        patch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        with pytest.raises(DeRaError, match="PEFT then finds no adapter to save"):
            check_sharding(DPOConfig())
    monkeypatch.delenv("FSDP_VERSION")  # as accelerate has it without one
    with pytest.raises(DeRaError, match=r"fsdp_version=1: .* FSDP2\. Set fsdp_version: 2"):
        check_sharding(DPOConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_config": {"version": 1}}, "fsdp_version=1: these programs train with FSDP2"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "fsdp_activation_checkpointing=true .* gradient_checkp"),
        ({"optim": "paged_adamw_32bit"}, "optim='paged_adamw_32bit' is bitsandbytes'.* set optim: adamw_torch"),
        ({"optim": "adamw_8bit"}, "optim='adamw_8bit' is bitsandbytes'"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True: .* leave it out"),
    ],
)
def test_what_it_can_not_do(settings, message, on_gpus):
    with pytest.raises(DeRaError, match=message):
        check_sharding(DPOConfig(fsdp=True, **settings))


@pytest.mark.parametrize(
    ("kind", "place"), [(DistributedType.NO, "one process"), (DistributedType.MULTI_CPU, "the CPU")]
)
def test_where_accelerate_would_leave_it_out_and_say_nothing(kind, place, monkeypatch):
    monkeypatch.setattr(sharding, "PartialState", lambda: SimpleNamespace(distributed_type=kind))
    with pytest.raises(DeRaError, match=f"FSDP shards a model over several accelerators, and this is {place}"):
        check_sharding(DPOConfig(fsdp=True))


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_the_programs_refuse_before_they_read_a_model(program, tiny_base, preferences, tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHED, "true")
    with pytest.raises(DeRaError, match="this is one process"):
        train(program, tmp_path / "out", model_name_or_path=tiny_base, dataset_name=preferences)
    assert not (tmp_path / "out").exists()


def test_commands_that_decode_are_not_started_for_it(monkeypatch):
    monkeypatch.setenv(LAUNCHED, "true")
    with pytest.raises(DeRaError, match="this command decodes with a whole one in each process"):
        join_processes()


def test_packed_weights_are_stored_in_the_dtype_that_they_are_gathered_in(tiny_base):
    ids, outputs = torch.arange(3, 11)[None], {}
    asked = find_sft_model(str(tiny_base), quantization="nf4")
    sharded = shard_quantized(asked, DPOConfig(fp16=False))
    assert sharded.quantized_to() == asked.quantized_to() == ("nf4", False)
    for kind, source in (("bytes", asked), ("floats", sharded)):
        model, _ = source.load_to_train()
        weight = next(module.weight for module in model.modules() if isinstance(module, Linear4bit))
        outputs[kind] = weight.dtype, model.eval()(ids).logits
    assert (outputs["bytes"][0], outputs["floats"][0]) == (torch.uint8, torch.bfloat16)
    assert torch.equal(outputs["bytes"][1], outputs["floats"][1])


def test_of_quantized_bases_it_shards_those_that_are_quantized_here_to_4_bits(tiny_base, tmp_path):
    with pytest.raises(DeRaError, match=r"FSDP can't shard a base in int8: .* \(quantization: nf4\)"):
        shard_quantized(find_sft_model(str(tiny_base), quantization="int8"), DPOConfig())
    stored = store_quantized(tiny_base, tmp_path / "stored", "nf4")
    with pytest.raises(DeRaError, match=r"is a checkpoint in nf4 .* whose bytes FSDP does not shard"):
        shard_quantized(find_sft_model(str(stored)), DPOConfig())
    plain = find_sft_model(str(tiny_base))
    assert shard_quantized(plain, DPOConfig()) is plain
