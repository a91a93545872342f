"""Text from outside, made safe to print."""


def printable(text: str) -> str:
    """Returns the text as one line of printable characters.

    Names come from data sets and files that nobody vetted: an escape sequence in one must not reach the terminal, nor a
    mark that reverses the direction of writing the report.
    """
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
