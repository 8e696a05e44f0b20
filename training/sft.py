"""
Fine-tunes a base with TRL's SFTTrainer: the model that alignment starts from, and DeRa's reference.

    python -m training.sft --config configs/tiny/sft.yaml
    python -m training.sft --config configs/tiny/sft.yaml --learning_rate 1e-3 --output_dir runs/other

Every key of the config is a key of this program, of TRL's SFTConfig or of its ModelConfig, and can be set on
the command line, which comes first. Run again, it reuses a finished model, and goes on from the last checkpoint of an
unfinished one.
"""

from dataclasses import dataclass, field

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet
from training.program import OutputFolder, ProgramArguments, parse, settings_of, start


@dataclass
class SFTArguments(ProgramArguments):
    """The data."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Texts to learn from: a hub id, a folder, a .jsonl/.csv/.parquet file, or path.py:function. "
            "Columns as in TRL's SFTTrainer: text, prompt and completion, or messages."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, if any."})


def make_parser():
    from trl import ModelConfig, SFTConfig, TrlParser

    return TrlParser(
        (SFTArguments, SFTConfig, ModelConfig), prog="python -m training.sft", description=__doc__, allow_abbrev=False
    )


def main(arguments: list[str] | None = None) -> None:
    be_quiet()
    script_args, training_args, model_args = parse(make_parser(), arguments)

    from trl import SFTTrainer, get_peft_config

    from training.data import dataset_fingerprint, read_dataset
    from training.models import model_fingerprint, trainer_model
    from training.trainer import WATCHING, run

    if not script_args.dataset_name or not model_args.model_name_or_path:
        raise DeRaError("dataset_name and model_name_or_path must be set, in the config or on the command line.")
    name, config = script_args.dataset_name, script_args.dataset_config
    dataset = read_dataset(name, script_args.dataset_train_split, config)
    held_out = read_dataset(name, script_args.dataset_test_split, config) if script_args.dataset_test_split else None
    output = OutputFolder(
        training_args.output_dir,
        settings_of(script_args, training_args, model_args, ignore=WATCHING),
        {"model": model_fingerprint(model_args.model_name_or_path), "dataset": dataset_fingerprint(dataset)},
        script_args.overwrite,
    )
    if output.is_complete:
        output.say_reused()
        return
    trainer = SFTTrainer(
        **trainer_model(model_args, training_args),
        args=training_args,
        train_dataset=dataset,
        eval_dataset=held_out,
        peft_config=get_peft_config(model_args),
    )
    run(trainer, script_args.overwrite)
    trainer.save_model()
    output.complete()


if __name__ == "__main__":
    start(main)
