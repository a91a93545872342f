"""The time that evidence has."""

import datetime
import os

from bdjax.errors import InputError

EPOCH = "SOURCE_DATE_EPOCH"


def now() -> str:
    """The time, or that of SOURCE_DATE_EPOCH, in seconds of UTC.

    Raises:
        InputError: it is not a number of seconds.
    """
    text = os.environ.get(EPOCH, "")
    try:
        seconds = int(text) if text else datetime.datetime.now(datetime.UTC).timestamp()
        time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise InputError(f"{EPOCH}={text} is not a number of seconds since 1970") from None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
