"""
FSDP2 on processes of the CPU, over gloo.

accelerate shards on accelerators alone, and these programs refuse FSDP elsewhere. So accelerate is told that the CPU's
processes are those of an accelerator; all else is its own, and torch's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "accelerate" / "fsdp2.yaml"
LAUNCHED = "ACCELERATE_USE_FSDP"  # accelerate's launcher sets it, and FSDP_VERSION and so on


@contextmanager
def fsdp2(**settings: str) -> Iterator[None]:
    """
    Meanwhile a trainer of several CPU processes, which `accelerate launch` started, shards.

    Args:
        settings: in place of those of the launcher's config, by their names there.
    """
    init = PartialState.__init__

    def init_as_on_accelerators(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "__init__", init_as_on_accelerators)
        patch.setenv(LAUNCHED, "true")
        for name, value in settings.items():
            patch.setenv(name.upper(), value)
        yield


@contextmanager
def without_fsdp() -> Iterator[None]:
    """Meanwhile each process has the whole model, whatever the launcher was told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LAUNCHED, "false")
        yield
