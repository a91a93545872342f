"""The error for invalid user input."""


class InputError(ValueError):
    """Invalid input: a file, a folder, a flag or an argument.

    The message is one line that names the file or flag, what is wrong with it, and what would be right. The experiment scripts
    print it and exit with status 2, having written nothing.
    """
