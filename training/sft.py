"""`python -m training.sft`: see dera_peft/training/sft.py."""

from dera_peft.training.program import start
from dera_peft.training.sft import main

if __name__ == "__main__":
    start(main)
