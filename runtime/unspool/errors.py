"""The one exception that means: the person at the command line can put this right."""


class UserError(Exception):
    """Its message is one line that names what is wrong and the remedy; the command prints it and exits with 2."""
