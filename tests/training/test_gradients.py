"""Every LoRA factor gets a gradient, on every CPU; and a run in which one does not is stopped."""

import pytest
import torch
from cpu_packing import force_cpu_packing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import train
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dera_peft import DeRaError
from dera_peft.training import sft_model, trainer
from dera_peft.training.gradients import GradientCheck

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def settings(tiny_base, preferences) -> dict:
    """Of runs that evaluate before every step."""
    return {
        "model_name_or_path": tiny_base, "dataset_name": preferences, "load_in_4bit": True,
        "dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]", "eval_on_start": True,
        "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], EVERY], ids=["attention", "all"])
def test_a_cpu_that_packs_4_bit_weights_to_evaluate_trains_as_any_other(modules, settings, tmp_path, monkeypatch):
    settings["lora_target_modules"] = modules
    expected = load_file(train("dpo", tmp_path / "plain", **settings) / "adapter_model.safetensors")
    force_cpu_packing(monkeypatch)
    found = load_file(train("dpo", tmp_path / "packing", **settings) / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) and tensor.any() for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        # all of q and v, and B of up, which the products of down's factors alone would reach, and those are zero
        (["q_proj", "v_proj", "up_proj", "down_proj"], r"20 of 32 LoRA factors got no gradient in step 1 .*: "
         r"'model.layers.0.self_attn.q_proj.lora_A.default', .* and 16 more\."),
        # B of all but o and down, which add to the residual stream
        (EVERY, r"20 of 56 .* in step 1 .*: 'model.layers.0.self_attn.q_proj.lora_B.default', "
         r"'model.layers.0.self_attn.k_proj.lora_B.default', .* and 16 more\."),
    ],
    ids=["some", "all"],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_a_base_that_is_packed_already_stops_the_run(modules, message, checkpointing, settings, tmp_path, monkeypatch):
    force_cpu_packing(monkeypatch)
    monkeypatch.setattr(sft_model, "keep_trainable", lambda model: None)
    settings |= {"lora_target_modules": modules, "gradient_checkpointing": checkpointing}
    with pytest.raises(DeRaError, match=message):
        train("dpo", tmp_path / "dpo", **settings)


class Block(TrainerCallback):
    """Cuts the gradient behind the second layer's o_proj after an evaluation."""

    def __init__(self, model: nn.Module):
        self.module = model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")

    def on_evaluate(self, args, state, control, **kwargs):
        self.module.register_forward_hook(lambda module, args, output: output.detach())


@pytest.fixture
def blocked(settings, monkeypatch) -> dict:
    """Of a run whose second layer's attention gets no gradient after the second step."""
    run = trainer.run

    def run_blocked(running):
        running.add_callback(Block(running.model))
        return run(running)

    monkeypatch.setattr(trainer, "run", run_blocked)
    return settings | {
        "load_in_4bit": False, "eval_on_start": False, "eval_steps": 2, "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_accumulation_steps": 2,
    }  # fmt: skip


def test_what_an_evaluation_breaks_is_found_after_it(blocked, tmp_path):
    with pytest.raises(DeRaError, match=r"4 of 16 .* in step 3 .*'model.layers.1.self_attn.q_proj.lora_A.default', "):
        train("dpo", tmp_path / "dpo", **blocked)


LAYERS = ["plain", "other"]


class Layers(nn.Module):
    """Some layers, which a test puts together."""

    def __init__(self):
        super().__init__()
        self.plain, self.other, self.embedding = nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(5, 3)
        self.experts = nn.ModuleList([nn.Linear(3, 3)])


class Step:
    """
    A run's steps, as a trainer makes them.

    Args:
        config: of LoRA over `Layers`.
    """

    def __init__(self, optim: str = "adamw_torch", **config):
        torch.manual_seed(0)
        self.model = get_peft_model(Layers(), LoraConfig(r=2, **config))
        self.check, self.state = GradientCheck(), TrainerState()
        arguments = TrainingArguments(report_to="none", optim=optim, optim_target_modules=LAYERS)
        self.rest = (arguments, self.state, TrainerControl())
        self.check.on_train_begin(*self.rest, model=self.model)

    def __call__(self, loss) -> None:
        """A step of the loss that a function of the layers and of their input, `[2, 3]`, gives."""
        self.model.zero_grad()
        loss(self.model.base_model.model, torch.ones(2, 3)).backward()
        self.check.on_pre_optimizer_step(*self.rest)
        torch.optim.SGD([weight for weight in self.model.parameters() if weight.requires_grad], lr=1).step()
        self.state.global_step += 1


def test_factors_that_rightly_have_no_gradient():
    step = Step(target_modules=LAYERS)
    step(lambda base, x: base.plain(x).square().sum())  # the other layer was not called: an image tower, say
    step = Step(target_modules=[*LAYERS, "embedding"])  # of an embedding, A starts at zero
    step(lambda base, x: (base.embedding(torch.arange(2)) + base.plain(base.other(x))).square().sum())
    step = Step(target_modules=[*LAYERS, "experts.0"])
    step(lambda base, x: (base.plain(x) + 0 * base.experts[0](x)).square().sum())
    step = Step(target_modules=LAYERS)
    with torch.no_grad():  # as the reference's pass is
        step.model.base_model.model.other(torch.ones(2, 3))
    step(lambda base, x: base.plain(x).square().sum())


def test_a_flat_loss_says_nothing_and_the_next_step_is_looked_at():
    step = Step(target_modules=LAYERS, init_lora_weights=False)
    step(lambda base, x: (base.plain(x) + base.other(x)).sum() * 0)
    with pytest.raises(DeRaError, match=r"2 of 4 .* in step 2 .* 'other.lora_A.default', 'other.lora_B.default'\. A"):
        step(lambda base, x: (base.plain(x) + base.other(x).detach()).square().sum())


def test_only_the_first_step_is_looked_at():
    step = Step(target_modules=LAYERS)
    step(lambda base, x: (base.plain(x) + base.other(x)).square().sum())
    step(lambda base, x: (base.plain(x) + base.other(x).detach()).square().sum())
    assert not any(layer._forward_pre_hooks for layer in step.model.modules())


def test_factors_that_alone_are_blocked_all_of_them():
    step = Step(target_modules=["other"])
    with pytest.raises(DeRaError, match="2 of 2 LoRA factors got no gradient in step 1"):
        step(lambda base, x: base.plain(x.requires_grad_()).sum() + base.other(x).detach().sum())


def test_an_optimizer_that_leaves_no_gradients_is_not_checked():
    step = Step(target_modules=LAYERS, optim="galore_adamw_layerwise")
    step(lambda base, x: base.plain(x.requires_grad_()).detach().sum() + x.sum())
