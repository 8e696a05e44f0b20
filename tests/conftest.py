"""Tiny models made on the spot, and the real stories260k where it stands beside the project."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # a tiny model is no work for several threads, and each test worker has a core

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_models import make_adapter, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dera_peft import DeRaModel, messages
from dera_peft.checkpoint.loading import Loaded
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli import app

pytest_plugins = ["small_runs"]

LONGEST = (
    "test_wheel.py", "test_recipes.py", "test_cli.py", "test_processes.py", "test_compatibility.py", "test_bench.py",
    "test_generation.py", "test_recipe.py", "test_retrain_vs_dera.py", "test_preferences.py", "test_run.py",
    "test_quiet.py",
)  # fmt: skip
STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run what is marked gpu, and what takes a `device`, on a GPU; without it no test sees one",
    )


def pytest_configure(config) -> None:
    """Without --gpu the tests are of the CPU, on every machine; subprocesses and xdist's workers inherit it."""
    if config.getoption("--gpu"):
        torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32, as products are by default
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch first asks for a device


def pytest_collection_modifyitems(config, items) -> None:
    on_gpu = config.getoption("--gpu")
    skip = pytest.mark.skip(reason="needs --gpu")
    kept = []
    for item in items:
        is_marked = item.get_closest_marker("gpu") is not None
        if is_marked and not on_gpu:
            item.add_marker(skip)
        if not on_gpu or is_marked or "device" in item.fixturenames:
            kept.append(item)
    # a file is one worker's: those that take longest come first, so that none of them is left for the end
    items[:] = sorted(
        kept, key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
    )


def pytest_collection_finish() -> None:
    """What was imported is not looked through again at every collection of garbage, which takes a third of a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where a test computes that is run on a CPU, and with --gpu on a GPU."""
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch) -> None:
    """What is told once in a process is told once in each test."""
    monkeypatch.setattr(messages, "_said", set())


@pytest.fixture
def dera(monkeypatch, capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def dera(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dera", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return dera


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A random fp32 Llama of four layers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base, tmp_path_factory) -> Path:
    """A LoRA adapter on all linear layers of `tiny_base`."""
    return make_adapter(tiny_base, tmp_path_factory.mktemp("tiny-adapter"))


@pytest.fixture(scope="session")
def top_adapter(tiny_base, tmp_path_factory) -> Path:
    """A LoRA adapter on the top two of the four layers of `tiny_base`."""
    return make_adapter(tiny_base, tmp_path_factory.mktemp("top-adapter"), layers_to_transform=[2, 3], scale=2.0)


@pytest.fixture(scope="session")
def tiny_loaded(tiny_base, tiny_adapter) -> Loaded:
    return ModelSource(base=str(tiny_base), adapter=str(tiny_adapter)).load()


@pytest.fixture
def tiny_model(tiny_base, tiny_adapter, tiny_loaded, monkeypatch) -> DeRaModel:
    """As loaded anew; a copy is made in a tenth of the time."""
    with monkeypatch.context() as patch:
        patch.setattr(ModelSource, "load", lambda source: deepcopy(tiny_loaded))
        return DeRaModel.from_pretrained(tiny_base, tiny_adapter)


@pytest.fixture(scope="session")
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip("stories260k is not beside the project")
    return STORIES


@pytest.fixture(scope="session")
def stories_adapter(stories, tmp_path_factory) -> Path:
    return make_adapter(stories, tmp_path_factory.mktemp("stories-adapter"), scale=0.5)
