"""The command `poet-peft`. `app` holds the commands; what each of them does is a function of the module beside it."""


class Refused(ValueError):
    """A command cannot be carried out as it was given. Its text is the whole message."""
