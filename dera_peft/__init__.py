"""Decoding-time realignment (DeRa, arXiv 2402.02992) with one base model and a LoRA adapter."""

from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel

__all__ = ["DeRaError", "DeRaModel"]
__version__ = "0.1.0"
