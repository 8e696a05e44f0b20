"""`python -m training.preferences`: see dera_peft/training/preferences.py."""

from dera_peft.training.preferences import main
from dera_peft.training.program import start

if __name__ == "__main__":
    start(main)
