"""Running a trainer: from its last checkpoint if there is one."""

import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint


def run(trainer: Trainer, overwrite: bool = False) -> dict[str, Any]:
    """
    Trains to the end, from the last checkpoint in the output folder if there is one and `overwrite` does not forget it.

    Returns:
        The final metrics.
    """
    folder = Path(trainer.args.output_dir)
    if overwrite:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint:
        print(f"going on from {checkpoint}", file=sys.stderr)
    return trainer.train(resume_from_checkpoint=checkpoint).metrics


# Settings that say how a run is watched and saved, not what comes out of it.
WATCHING = (
    "disable_tqdm", "eval_on_start", "eval_steps", "eval_strategy", "log_level", "log_level_replica", "logging_dir",
    "logging_first_step", "logging_steps", "logging_strategy", "project", "report_to", "resume_from_checkpoint",
    "run_name", "save_only_model", "save_steps", "save_strategy", "save_total_limit", "trackio_space_id",
)  # fmt: skip
