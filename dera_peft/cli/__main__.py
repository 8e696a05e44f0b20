"""`python -m dera_peft.cli`, as for torchrun."""

from dera_peft.cli.app import main

main()
