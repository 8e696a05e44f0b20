"""Calm output for the command line and the training programs."""

import logging
import os
import sys
import warnings

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")
BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


def be_quiet() -> None:
    """
    Silences the libraries' notes that a user can do nothing about, and progress bars but those of downloads, which stay
    on a terminal; never errors.

    It is to be called before transformers is imported, which reads these settings then. What a user has set stays.
    """
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    # at import it warns where there is no GPU, and where a CPU has AVX512-BF16 and no further package for it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs as an error, it raises too
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        for name in (BARS, "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    elif BARS not in os.environ:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        # transformers' own bars ("Loading weights") follow the general state, downloads that of their group
        disable_progress_bars()
        enable_progress_bars("huggingface_hub")
