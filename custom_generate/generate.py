"""
λ for transformers' `generate`: this folder's parent is what `custom_generate=` names.

    peft_model.generate(**inputs, custom_generate="path/to/dera_peft", trust_remote_code=True, lam=0.5)
"""

from dera_peft.engine.custom_generate import generate

__all__ = ["generate"]
