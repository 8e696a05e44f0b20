"""`python -m training.distill`, the same as `dera distill`."""

import sys

from dera_peft.cli.app import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
