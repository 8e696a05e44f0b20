"""Decoding-time realignment (DeRa, arXiv 2402.02992) with one base model and a LoRA adapter."""

from typing import TYPE_CHECKING

from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from dera_peft.model import DeRaModel

    __version__: str

__all__ = ["DeRaError", "DeRaModel", "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    # torch and transformers take seconds to import, which `dera --help` should not
    if name == "DeRaModel":
        from dera_peft.model import DeRaModel

        return DeRaModel
    if name == "__version__":
        from importlib.metadata import version

        return version("dera-peft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
