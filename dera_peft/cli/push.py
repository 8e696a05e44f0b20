"""`dera push`: an adapter on the hub, with its dera.json and a card."""

from dataclasses import dataclass

from dera_peft.errors import DeRaError
from dera_peft.files import check_exists
from dera_peft.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class PushSettings(Settings):
    """The settings of `dera push`."""

    adapter: str = setting(
        help="The adapter's folder, with its dera.json, as dera dpo and dera sft write it.", metavar="DIR"
    )
    to: str = setting(help="The repository, made if it is not there.", metavar="ORG/NAME")
    base: str | None = setting(
        None,
        "The base's hub id, where the adapter was trained on a folder; that has to be there first.",
        metavar="ORG/NAME",
    )
    private: bool | None = setting(
        None, "Whether a new repository is private; unless given, the organisation's default."
    )
    revision: str | None = setting(None, "The branch to commit to.", metavar="BRANCH")
    create_pr: bool = setting(False, "Open a pull request instead.")
    commit_message: str | None = setting(None, "The commit's message.", metavar="TEXT")


def push(settings: PushSettings) -> None:
    """Upload an adapter to the hub, with its dera.json, tokenizer and a card; never the base, checkpoints or pickles.

    Log in first (`hf auth login`). Others then need no more than its name: `dera generate --adapter ORG/NAME`.

    **Examples**

    `dera push --adapter ./dpo --to ORG/dpo --private`

    `dera push --adapter runs/tiny/dpo --base ORG/tiny-sft --to ORG/tiny-dpo`
    """
    check_exists("adapter", settings.adapter)
    from dera_peft.checkpoint.push import push
    from dera_peft.checkpoint.record import FILE_NAME, Record

    if not Record.is_in(settings.adapter):
        raise DeRaError(
            f"adapter={settings.adapter!r} has no {FILE_NAME}, which says what its reference is: load it in "
            "Python (DeRaModel.from_pretrained) and use push_to_hub. What dera export made needs none: hf upload."
        )
    print(
        push(
            settings.adapter, settings.to, base=settings.base, private=settings.private, revision=settings.revision,
            create_pr=settings.create_pr, commit_message=settings.commit_message,
        )
    )  # fmt: skip
