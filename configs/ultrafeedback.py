"""
UltraFeedback, as the recipes need it: held-out prompts for a sweep, and preferences in a format that TRL takes.

Two versions of it are on the hub, split differently; a recipe's held-out prompts must come from the one that it was
trained on.
"""

import datasets

TRL = "trl-lib/ultrafeedback_binarized"  # chosen and rejected are whole chats; train and test
H4 = "HuggingFaceH4/ultrafeedback_binarized"  # the alignment handbook's; also prompt as a text; train_prefs, test_prefs


def _prompts(name: str, split: str) -> datasets.Dataset:
    """The chats of a split without their last answer, each once."""
    chats = datasets.load_dataset(name, split=split)["chosen"]
    prompts = {str(chat[:-1]): chat[:-1] for chat in chats}
    return datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts.values()])


def held_out_prompts() -> datasets.Dataset:
    """Prompts of the test split of trl-lib's version."""
    return _prompts(TRL, "test")


def zephyr_held_out_prompts() -> datasets.Dataset:
    """Prompts of the test split of the handbook's version."""
    return _prompts(H4, "test_prefs")


def zephyr_preferences() -> datasets.DatasetDict:
    """
    The handbook's preferences, as chats: chosen and rejected, from which TRL takes the prompt.

    Beside them the original has the prompt as a text, which does not go with answers that are messages.
    """
    splits = {split: datasets.load_dataset(H4, split=split) for split in ("train_prefs", "test_prefs")}
    return datasets.DatasetDict({split: rows.select_columns(["chosen", "rejected"]) for split, rows in splits.items()})
