"""An adapter's folder, uploaded to the hub."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from dera_peft.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from dera_peft.checkpoint.card import write_card
from dera_peft.checkpoint.record import Record
from dera_peft.errors import DeRaError, first_line
from dera_peft.files import is_same_folder

# what an adapter's folder has beside its config and weights: its tokenizer. Checkpoints and pickles stay here.
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "vocab.*", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """
    Uploads the adapters of a folder with a `dera.json`, their tokenizers, that record and a card, all in one commit.
    Of the base only its name goes there.

    Args:
        folder: as `dera dpo`, `dera sft` or `DeRaModel.save_pretrained` writes it.
        repo_id: "organisation/name", made if it is not there.
        base: the base's hub id; the record's unless given.
        private: whether a new repository is private; the organisation's default unless given.
        token: as in `huggingface_hub`.
        revision: the branch to commit to.
        create_pr: open a pull request instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        DeRaError: the base is a folder or is not on the hub, the folder has no record, or the hub refuses.
    """
    folder = Path(folder)
    record = Record.load(folder)
    if base is not None:
        record = record.with_base(base)
        record.check_base()
    if os.path.isdir(record.base) or record.base.startswith((".", "/", "~")):
        raise DeRaError(
            f"base={record.base!r} is a folder, which nobody else has. Upload it first "
            f"(hf upload ORGANISATION/NAME {record.base}), and give its hub id as base."
        )
    api = HfApi(token=token)
    try:
        if not api.repo_exists(record.base):
            raise DeRaError(f"base={record.base!r} is not on the hub, or is not open to you: upload it first.")
        with TemporaryDirectory() as made:
            _gather(record, folder, Path(made), repo_id)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=made, revision=revision, create_pr=create_pr,
                commit_message=commit_message or "Upload a LoRA adapter with its dera.json",
            )  # fmt: skip
    except HFValidationError as error:
        raise DeRaError(f"a repository can't have such a name: {first_line(error)}") from error
    except RepositoryNotFoundError as error:  # which a token without rights is told too
        raise DeRaError(
            f"repo_id={repo_id!r}: the hub has none that you may write to. Log in: hf auth login."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DeRaError(f"repo_id={repo_id!r}: the upload failed: {first_line(error)}") from error
    return commit.pr_url or commit.commit_url


def _gather(record: Record, folder: Path, made: Path, repo_id: str) -> None:
    """What is uploaded, into `made`."""
    paths: dict[str, str] = {}
    for name, adapter in record.adapters.items():
        if not os.path.isdir(adapter):  # of the hub
            paths[name] = adapter
            continue
        place = made if is_same_folder(folder, adapter) else made / name
        place.mkdir(exist_ok=True)
        paths[name] = str(place)
        _copy_adapter(Path(adapter), place, record.base)
    training, dataset = record.training, record.training.get("dataset")
    if isinstance(dataset, str) and os.path.exists(dataset):  # a path of this machine says nothing elsewhere
        training = {**training, "dataset": os.path.basename(os.path.normpath(dataset))}
    record = replace(record, adapters=paths, training=training)
    record.save(made)
    write_card(record, made, repo_id)


def _copy_adapter(adapter: Path, place: Path, base: str) -> None:
    shutil.copy(adapter / WEIGHTS_FILE, place)
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (place / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in (file for pattern in TOKENIZER for file in adapter.glob(pattern)):
        (shutil.copytree if file.is_dir() else shutil.copy)(file, place / file.name)
