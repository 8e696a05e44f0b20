"""`python -m training.dpo`: see dera_peft/training/dpo.py."""

from dera_peft.training.dpo import main
from dera_peft.training.program import start

if __name__ == "__main__":
    start(main)
