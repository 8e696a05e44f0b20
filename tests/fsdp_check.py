"""
`dera sft` and `dera dpo` sharded by FSDP2 on two CPU processes, against one process: what `make fsdp-check` runs.

    python tests/fsdp_check.py [--only dpo-nf4]

In fp32, at the same global batch. Of each case the first and the last loss and every weight that was trained must be
those of one process, a run that went on from a checkpoint must end as the one that was not stopped, and a run with
another seed must differ, or else nothing is shown. Saved adapters are loaded by DeRaModel and by PEFT alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fsdp2_on_cpu import CONFIG, fsdp2  # noqa: E402

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
NF4 = {"quantization": "nf4"}
EVALUATED = {"dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]", "early_stopping_patience": 3}
SAVED = {"save_strategy": "steps", "save_steps": 2}
SHARDED = {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}
TOLERANCE, OTHER = 1e-5, 1e-3


class Case(NamedTuple):
    program: str
    settings: dict
    launcher: dict[str, str] = {}  # settings in place of configs/accelerate/fsdp2.yaml's
    rest: str | None = None  # the part of a case's run that a killed run has left: "middle" or "end"


def make_cases(data: Path) -> dict[str, Case]:
    base = {"model_name_or_path": data / "base"}
    texts, pairs = {**base, "dataset_name": data / "texts.jsonl"}, {**base, "dataset_name": data / "pairs.jsonl"}
    frozen = {**pairs, "sft_adapter": data / "sft"}
    continued = {**frozen, "continue_sft_adapter": True, "lora_r": None, "lora_target_modules": None}
    lora = {**texts, **LORA, "lora_dropout": 0.0}  # each process would drop others
    cases = {
        "sft-whole": Case("sft", texts),
        "sft-whole-sharded": Case("sft", {**texts, **SAVED}, SHARDED),
        "sft-lora": Case("sft", lora),
        "sft-nf4-merged": Case("sft", {**lora, **NF4, "merge_adapter": True}),
        "dpo": Case("dpo", {**pairs, **SAVED}),
        "dpo-each-loads": Case("dpo", pairs, {"fsdp_cpu_ram_efficient_loading": "false"}),
        "dpo-frozen": Case("dpo", frozen),
        "dpo-continued": Case("dpo", {**continued, **SAVED}),
        "dpo-checkpointing": Case("dpo", {**pairs, "gradient_checkpointing": True}),
        "dpo-accumulated": Case("dpo", {**pairs, "gradient_accumulation_steps": 2}),
        "dpo-best": Case("dpo", {**pairs, **SAVED, **EVALUATED}),
        "dpo-best-sharded": Case("dpo", {**pairs, **SAVED, **EVALUATED}, SHARDED),
        "dpo-nf4": Case("dpo", {**pairs, **SAVED, **NF4}),
        "dpo-nf4-frozen": Case("dpo", {**frozen, **NF4}),
        "dpo-nf4-continued": Case("dpo", {**continued, **NF4}),
    }
    for name in ("dpo", "dpo-nf4", "dpo-continued", "dpo-best-sharded", "sft-whole-sharded"):
        for rest in ("middle", "end"):
            cases[f"{name} from the {rest}"] = cases[name]._replace(rest=rest)
    return cases


def make_data(folder: Path) -> None:
    """A base, an SFT adapter over it, texts and pairs."""
    import random

    import torch
    from small_runs import words, write_rows
    from tiny_models import make_adapter, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, **ids,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rng = random.Random(5)
    pairs = [
        {"prompt": words(rng, 3), "chosen": f" {words(rng, 4)}", "rejected": f" {words(rng, 4)}"} for _ in range(40)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "texts.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in pairs])
    make_adapter(folder / "base", folder / "sft", seed=7)


def leave_the_rest(whole: Path, folder: Path, rest: str) -> None:
    """Makes `folder` what a run to `whole` leaves that was killed behind its last checkpoint, or the one before."""
    shutil.copytree(whole, folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "complete": False}))
    for name in ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json", "dera.json"):
        (folder / name).unlink(missing_ok=True)
    if rest == "middle":
        shutil.rmtree(folder / "checkpoint-4")


def sharded(work: Path, name: str) -> None:
    """A case's run, in each of two processes."""
    from small_runs import train

    case = make_cases(work / "data")[name]
    folder = work / "two" / name
    with fsdp2(**case.launcher):
        train(case.program, folder, num_processes=2, per_device_train_batch_size=2, **case.settings)


def compare(work: Path, name: str, case: Case) -> str:
    """A line for the table. Raises `AssertionError` where the runs differ."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from small_runs import train
    from transformers import AutoModelForCausalLM

    from dera_peft import DeRaModel

    plain = name.partition(" from")[0]
    one, other = work / "one" / plain, work / "other" / plain
    for folder, seed in ((one, 42), (other, 43)):
        if not folder.exists():
            train(case.program, folder, per_device_train_batch_size=4, seed=seed, **case.settings)
    two = work / "two" / name
    file = "adapter_model.safetensors" if (one / "adapter_config.json").is_file() else "model.safetensors"
    expected, found, differing = (load_file(folder / file) for folder in (one, two, other))
    assert expected.keys() == found.keys(), f"{name}: {sorted(expected.keys() ^ found.keys())[:4]}"

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return max(float((weights[key] - tensor).abs().max()) for key, tensor in expected.items())

    assert distance(found) < TOLERANCE, f"{name}: {distance(found)}"
    assert distance(differing) > OTHER, f"{name}: another seed differs by {distance(differing)} alone"
    line = f"{name:32} {distance(found):.1e} {distance(differing):.1e}"
    if file == "model.safetensors":
        return line
    metrics, theirs = (json.loads((f / "dera.json").read_text())["training"]["metrics"] for f in (one, two))
    for key in ("first_loss", "loss", "train_loss"):
        assert abs(metrics[key] - theirs[key]) < TOLERANCE, f"{name}: {key} {metrics[key]} {theirs[key]}"
    ids = torch.arange(3, 11)[None]
    quantization = case.settings.get("quantization")
    mixed, expected_mixed = (
        DeRaModel.from_pretrained(adapter=f, quantization=quantization)(ids, lam=0.5).logits for f in (two, one)
    )
    torch.testing.assert_close(mixed, expected_mixed, atol=1e-3, rtol=1e-3)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.settings["model_name_or_path"]), two)
    return f"{line}  loss {metrics['loss']:.6f}, {theirs['loss']:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose names hold this")
    parser.add_argument("--sharded", nargs=2, metavar=("FOLDER", "CASES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sharded:
        for name in options.sharded[1].split(","):
            sharded(Path(options.sharded[0]), name)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work / "data")
        cases = {name: case for name, case in make_cases(work / "data").items() if options.only in name}
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(CONFIG),
            "--num_processes",
            "2",
        ]
        launch += ["--main_process_port", "0", __file__, "--sharded", str(work)]
        whole = [name for name, case in cases.items() if case.rest is None]
        rests = [name for name, case in cases.items() if case.rest is not None]
        if whole:
            subprocess.run([*launch, ",".join(whole)], check=True)
        for name in rests:
            leave_the_rest(work / "two" / name.partition(" from")[0], work / "two" / name, cases[name].rest or "")
        if rests:
            subprocess.run([*launch, ",".join(rests)], check=True)
        lines, failures = [], []
        for name, case in cases.items():
            try:
                lines.append(compare(work, name, case))
            except AssertionError as error:
                failures.append(str(error))
    print(f"\n{'':32} from one process, another seed from it (largest difference of a weight)")
    print("\n".join(lines))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
