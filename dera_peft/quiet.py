"""Calm output for the command line and the training programs."""

import logging
import os
import sys
import warnings


def be_quiet() -> None:
    """
    Silences the libraries' notes that a user can do nothing about, and their progress bars in a pipe; never errors.

    It is to be called before transformers is imported, which reads these settings then. What a user has set stays.
    """
    warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|torch|bitsandbytes)(\.|$)")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import where there is no GPU
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
