"""Makes untrusted text safe to print."""


def printable(text: str) -> str:
    """Returns the text as one line of printable characters.

    Names come from untrusted datasets and files: an escape sequence must not reach the terminal, nor a character that reverses
    the direction of writing the report.
    """
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
