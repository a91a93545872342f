"""How a broken contract is reported."""

import contextlib
from collections.abc import Iterator


class ContractError(AssertionError):
    """An entry breaks a promise that the rest of bdjax relies on; the message says which."""


def require(holds: object, promise: str) -> None:
    """Raise if a promise is broken. Unlike an assertion, this is no part of the program that `python -O` leaves out.

    Args:
        holds: whether it is kept.
        promise: what should be so: "attack mark: apply keeps the shape of the image".

    Raises:
        ContractError: it is not kept.
    """
    if not holds:
        raise ContractError(f"broken: {promise}")


@contextlib.contextmanager
def promised(promise: str) -> Iterator[None]:
    """Turn the failure of an assertion on arrays within the block into a broken promise.

    Args:
        promise: as for `require`.

    Raises:
        ContractError: an assertion in the block fails; its message is below the promise.
    """
    try:
        yield
    except ContractError:
        raise
    except AssertionError as error:
        raise ContractError(f"broken: {promise}\n{error}") from error
