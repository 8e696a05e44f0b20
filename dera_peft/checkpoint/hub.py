"""The folder of a hub adapter in the hub's cache, with all that its `dera.json` names."""

import logging
import os

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dera_peft.messages import warn_once

# adapters may lie in folders of their own; checkpoints, merged models and pickles stay on the hub
WANTED = ("*.json", "*.jinja", "*.model", "*.txt", "adapter_model.safetensors", "*/adapter_model.safetensors")
UNWANTED = ("checkpoint-*", "*/checkpoint-*")

logger = logging.getLogger(__name__)


def folder_with(name: str, file: str) -> str | None:
    """
    The folder that has `file`: `name` itself, or of a hub repository its folder in the hub's cache, downloaded where
    there is a newer one; None where it has no such file.
    """
    if os.path.isdir(name):
        # what is there and can't be read is no file that is missing
        return name if os.path.lexists(os.path.join(name, file)) else None
    try:
        hf_hub_download(name, file)
    except LocalEntryNotFoundError:
        is_cached = isinstance(try_to_load_from_cache(name, "adapter_config.json"), str)
        if is_cached and try_to_load_from_cache(name, file) is None:  # the cache would know that there is none
            warn_once(
                logger,
                f"the hub can't be reached, so whether {name!r} has a {file} is not known: it is read without one.",
            )
        return None
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # whoever loads its adapter says what is wrong with it
    return snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
