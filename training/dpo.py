"""`python -m training.dpo`, the same as `dera dpo`."""

import sys

from dera_peft.cli.app import main

if __name__ == "__main__":
    main(["dpo", *sys.argv[1:]])
