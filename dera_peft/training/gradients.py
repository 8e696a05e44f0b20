"""The check that every LoRA factor gets a gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dera_peft.errors import DeRaError

SHOWN = 4
# These optimizers update the weights within the backward pass, and leave no gradient behind.
STEP_IN_BACKWARD = ("lomo", "layerwise")


@dataclass(frozen=True)
class Factor:
    """One factor of a LoRA layer, A or B; its gradient is a product with the other one."""

    name: str
    layer: LoraLayer
    weight: nn.Parameter
    other: nn.Parameter


class Seen(NamedTuple):
    """What a step has shown of a factor, in all processes together."""

    is_called: bool  # its layer was, with gradients
    arrived: bool  # it has a gradient, which may be zero
    is_nonzero: bool  # the gradient is not
    other_is_nonzero: bool

    @property
    def is_blocked(self) -> bool:
        """Whether it should have a gradient, and has none. Of B = 0, where LoRA starts, A's gradient is zero."""
        return not self.arrived or (not self.is_nonzero and self.other_is_nonzero)


class GradientCheck(TrainerCallback):
    """
    Stops a run in which a LoRA factor gets no gradient: it would be saved as it was, and nothing would say so.

    The check is made at the first step, and at the first one after each evaluation, which can leave a layer in a state
    for inference. It is made of LoRA alone: where all weights are trained, it may be right that one gets no gradient.
    """

    def __init__(self):
        self.factors: list[Factor] = []
        self.called: set[LoraLayer] = set()
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(  # pyrefly: ignore[bad-override] # a trainer calls it with its model
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        self.factors = [] if args.optim.endswith(STEP_IN_BACKWARD) else list(trained_factors(model))
        self._watch()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._watch()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self.hooks:
            return
        seen = self._seen(args.device)
        # A layer that was not called is no fault: an image tower where all rows are text, say.
        blocked = [f for f, each in zip(self.factors, seen, strict=True) if each.is_called and each.is_blocked]
        is_flat = not any(each.is_nonzero for each in seen)
        # A flat loss has a gradient of zero at every factor (a hinge that every pair of the batch meets), and says
        # nothing of a layer: then the next step is looked at. Where gradients do not arrive at all, they are None.
        if is_flat and all(each.arrived for each in seen if each.is_called):
            return
        self._stop_watching()
        if blocked:
            raise DeRaError(_message(blocked, len(self.factors), state.global_step + 1))

    def _seen(self, device: torch.device) -> list[Seen]:
        """
        Of each factor, in one exchange between the processes: of a sharded one each has some rows, or none.

        Args:
            device: that the processes exchange on.
        """
        here = []
        for factor in self.factors:
            grad = factor.weight.grad
            other = _local(factor.other.detach())
            is_nonzero = grad is not None and bool(_local(grad).any())
            here.append([factor.layer in self.called, grad is not None, is_nonzero, bool(other.any())])
        marks = torch.tensor(here, dtype=torch.uint8, device=device)  # [F, 4]
        if distributed.is_initialized():
            distributed.all_reduce(marks, distributed.ReduceOp.MAX)
        return [Seen(*map(bool, row)) for row in marks.tolist()]

    def _watch(self) -> None:
        self._stop_watching()
        for layer in {factor.layer for factor in self.factors}:
            module = cast("nn.Module", layer)  # as every LoRA layer is: LoraLayer is mixed into modules
            self.hooks.append(module.register_forward_pre_hook(self._note))

    def _note(self, layer: LoraLayer, args: tuple) -> None:
        if torch.is_grad_enabled():  # the reference's pass, with the adapter off, has none
            self.called.add(layer)

    def _stop_watching(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.called = [], set()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, if it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_factors(model: nn.Module) -> Iterator[Factor]:
    """
    The LoRA factors that are trained.

    A mixture's experts are left out: which of them see a token that counts in the loss is the batch's doing.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or "experts" in name.split("."):
            continue
        for kind in ("lora_{}", "lora_embedding_{}"):
            down, up = (getattr(layer, kind.format(side)) for side in "AB")
            for adapter in down:
                a, b = (getattr(factors[adapter], "weight", factors[adapter]) for factors in (down, up))
                for side, weight, other in (("A", a, b), ("B", b, a)):
                    if weight.requires_grad:
                        yield Factor(f"{name}.{kind.format(side)}.{adapter}", layer, weight, other)


def _message(blocked: list[Factor], total: int, step: int) -> str:
    names = ", ".join(repr(factor.name.removeprefix("base_model.model.")) for factor in blocked[:SHOWN])
    more = f" and {len(blocked) - SHOWN} more" if len(blocked) > SHOWN else ""
    return (
        f"{len(blocked)} of {total} LoRA factors got no gradient in step {step} and would not be trained: "
        f"{names}{more}. A layer between them and the loss passes no gradient on. If it is quantized, train "
        "without quantization or on another device; or leave these modules out of lora_target_modules."
    )
