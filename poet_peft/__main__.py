"""`python -m poet_peft`, the same as the command `poet-peft`."""

from .cli.app import main


if __name__ == "__main__":
    main()
