"""The errors that end a run with one line."""


class InputError(ValueError):
    """Invalid input: a file, a folder, a flag or an argument.

    The message is one line that names the file or flag, what is wrong with it, and what would be right. The experiment scripts
    print it and exit with status 2, having written nothing.
    """


class ProcessError(RuntimeError):
    """Another process has failed or is gone; the message is one line that says which, and why if known."""
