"""The formats of `dera export`, by name."""

from typing import Literal

Format = Literal["peft", "safetensors", "gguf"]
