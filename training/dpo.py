"""
Aligns an SFT model with a LoRA adapter, by TRL's DPOTrainer. The reference is the SFT model: the adapter switched off.

    python -m training.dpo --config configs/tiny/dpo.yaml
    python -m training.dpo --config configs/tiny/dpo.yaml --beta 0.05 --output_dir runs/beta-0.05

Every key of the config is a key of this program, of TRL's DPOConfig or of its ModelConfig, and can be set on
the command line, which comes first. Run again, it reuses a finished adapter, and goes on from the last checkpoint of an
unfinished one.
The folder gets a PEFT adapter, and a dera.json that names the base and β: `dera generate --adapter FOLDER` needs no
more.
"""

from dataclasses import dataclass, field

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet
from training.program import OutputFolder, ProgramArguments, parse, settings_of, start


@dataclass
class DPOArguments(ProgramArguments):
    """The data."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preferences: a hub id, a folder, a .jsonl/.csv/.parquet file, or path.py:function. Columns as "
            "TRL's DPOTrainer takes them: prompt, chosen and rejected."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, if any."})


def make_parser():
    from trl import DPOConfig, ModelConfig, TrlParser

    return TrlParser(
        (DPOArguments, DPOConfig, ModelConfig), prog="python -m training.dpo", description=__doc__, allow_abbrev=False
    )


def main(arguments: list[str] | None = None) -> None:
    be_quiet()
    script_args, training_args, model_args = parse(make_parser(), arguments)

    from trl import DPOTrainer, get_peft_config

    from dera_peft.record import Record
    from training.data import dataset_fingerprint, read_dataset
    from training.models import model_fingerprint, trainer_model
    from training.trainer import WATCHING, run

    if not script_args.dataset_name or not model_args.model_name_or_path:
        raise DeRaError("dataset_name and model_name_or_path must be set, in the config or on the command line.")
    if not model_args.use_peft:
        raise DeRaError("use_peft=False: DeRa needs the aligned model as a LoRA adapter; set use_peft: true.")
    base, output_dir = model_args.model_name_or_path, training_args.output_dir
    name, config = script_args.dataset_name, script_args.dataset_config
    dataset = read_dataset(name, script_args.dataset_train_split, config)
    held_out = read_dataset(name, script_args.dataset_test_split, config) if script_args.dataset_test_split else None
    output = OutputFolder(
        output_dir,
        settings_of(script_args, training_args, model_args, ignore=WATCHING),
        {"model": model_fingerprint(base), "dataset": dataset_fingerprint(dataset)},
        script_args.overwrite,
    )
    if output.is_complete:
        output.say_reused()
        return
    trainer = DPOTrainer(
        **trainer_model(model_args, training_args),
        args=training_args,
        train_dataset=dataset,
        eval_dataset=held_out,
        peft_config=get_peft_config(model_args),
    )
    metrics = run(trainer, script_args.overwrite)
    trainer.save_model()
    training = {
        "method": "dpo",
        "beta": training_args.beta,
        "loss_type": training_args.loss_type,
        "steps": trainer.state.global_step,
        "metrics": {**last_log(trainer.state.log_history), "train_loss": metrics["train_loss"]},
        "dataset": name,
        "base_fingerprint": output.record["inputs"]["model"],
        "versions": versions(),
    }
    branches = {"reference": [], "aligned": ["default"]}
    Record(base, {"default": output_dir}, branches, training=training).save(output_dir)
    output.complete()


def last_log(history: list[dict]) -> dict[str, float]:
    """The last entry of a trainer's log that tells of the loss."""
    entries = [entry for entry in history if "rewards/margins" in entry]
    return {key: value for key, value in entries[-1].items() if isinstance(value, (int, float))} if entries else {}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("dera-peft", "peft", "torch", "transformers", "trl")}


if __name__ == "__main__":
    start(main)
