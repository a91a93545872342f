"""The one error that a user of the command line is meant to read."""


class InputError(ValueError):
    """Something that came from outside cannot be used: a file, a folder, a flag.

    The message is one line that says which file or flag, what is wrong with it, and what would be right. The experiment
    scripts print that line and exit with status 2, having written nothing.
    """
