"""`python -m training.sft`, the same as `dera sft`."""

import sys

from dera_peft.cli.app import main

if __name__ == "__main__":
    main(["sft", *sys.argv[1:]])
