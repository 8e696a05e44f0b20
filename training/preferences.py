"""`python -m training.preferences`, the same as `dera preferences`."""

import sys

from dera_peft.cli.app import main

if __name__ == "__main__":
    main(["preferences", *sys.argv[1:]])
