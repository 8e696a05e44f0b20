"""How a command leaves the processes that it was started with."""

import subprocess
import sys
from contextlib import suppress

import pytest
from torch import distributed

from dera_peft import DeRaError
from dera_peft.cli.program import process_group


@pytest.mark.parametrize("error", [None, DeRaError, KeyboardInterrupt])
def test_the_process_group_ends_after_an_error_too(tmp_path, error):
    with suppress(DeRaError, KeyboardInterrupt), process_group():
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        assert distributed.is_initialized()
        if error is not None:
            raise error("wrong")
    assert not distributed.is_initialized()


@pytest.mark.parametrize(("error", "ends"), [(None, True), (DeRaError, False)])
def test_a_group_of_nccl_is_left_after_an_error(monkeypatch, error, ends):
    ended = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: ended.append(True))
    with suppress(DeRaError), process_group():
        if error is not None:
            raise error("wrong")
    assert bool(ended) is ends


def test_without_torch_nothing_is_imported():
    code = (
        "import sys\nfrom dera_peft.cli.program import process_group\n"
        "with process_group(): pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
