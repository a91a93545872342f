"""Classifiers behind an HTTP address, as black boxes. The protocol is in docs/models_black_box.md.

Every answer is kept, in memory and in a folder if there is one, under the hash of its image, so that no image is sent twice,
also by a run that continues after it was killed (at most the batch that was under way is sent again). Only Python's standard
library is used. Nothing that a server returns is trusted: it gets no more time and memory than the numbers need, redirects are
not followed, and arrays are read without pickle.
"""

import contextlib
import hashlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax import atomic
from bdjax.datasets.archives import read_npy
from bdjax.datasets.files import list_level, read_file
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError
from bdjax.exchange.outputs import Outputs, as_logits, check_outputs
from bdjax.types import Classifier

NPY = "application/x-npy"
JSON = "application/json"
BATCH_SIZE = 64
"""Images of a request."""
TIME_LIMIT = 60.0
"""Seconds for a request, from connecting to the last byte of the answer."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each repetition of a request that failed."""
_BYTES_OF_A_NUMBER = {NPY: 8, JSON: 64}
_BYTES_BESIDE = 4096
_DIGEST_BYTES = 32
_MAXIMUM_STORED_BYTES = 1 << 26
"""Largest file of answers."""


_answers_to_grey: dict[tuple, np.ndarray] = {}
"""Of addresses that were connected without a folder: logits [1, K] for the next connection of this process with a folder, since
a run checks addresses before it opens its folder."""


class _Address(NamedTuple):
    is_encrypted: bool
    host: str
    port: int | None
    target: str
    """path and query"""
    content_type: str


class _Retry(Exception):
    """A failure that may not happen again."""


class _Response(http.client.HTTPResponse):
    """An answer whose chunks have sizes of at least 0; the base class takes -1 for the rest of the stream."""

    def _read_next_chunk_size(self) -> int:
        size = super()._read_next_chunk_size()
        if size < 0:
            raise http.client.HTTPException(f"a chunk of {size} bytes")
        return size


def connect(
    url: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    outputs: Outputs = "logits",
    store: Path | None = None,
    batch_size: int = BATCH_SIZE,
    time_limit: float = TIME_LIMIT,
    waits: Sequence[float] = WAITS,
) -> Classifier:
    """A classifier that queries a server.

    Args:
        url: http://HOST:PORT/PATH or https://...; with `?format=json` the exchange is in JSON instead of NumPy's format.
        num_classes: K.
        image_shape: (H, W, C).
        outputs: what the server returns; see `bdjax.exchange.outputs`.
        store: a folder for the answers, which is created; None to keep them in memory only. Answers of several addresses,
            outputs and image shapes may share it. Delete it if the model behind an address has changed.
        batch_size: images of a request.
        time_limit: seconds for a request.
        waits: seconds before each repetition, after a connection error or a status of 500 or more; nothing else is repeated.

    Returns:
        A function from float32 [B, H, W, C] in [0, 1] to float32 [B, K].

    Raises:
        InputError: the address has another form, or the server does not answer a first grey image as it should; after a
            connection without a folder, the next one with a folder does not send that image again. Later, from the function:
            the server fails, or returns anything but finite numbers of that shape.
    """
    check_outputs(outputs)
    address = _read_address(url)
    if batch_size < 1 or time_limit <= 0:
        raise InputError(f"{url}: batch size {batch_size} and time limit {time_limit} should be above 0")
    answers = _Answers(store, f"{url} {outputs} {list(image_shape)}", num_classes)

    def classifier(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, np.float32)
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
        # Each unknown image once, even if it occurs several times.
        unknown = {digest: row for row, digest in reversed(list(enumerate(digests))) if digest not in answers}
        rows = sorted(unknown.values())
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found = _ask(url, address, images[batch], num_classes, outputs, time_limit, waits)
            answers.add([digests[row] for row in batch], found)
        return answers.of(digests)

    classifier.__name__ = url
    grey = np.full((1, *image_shape), 0.5, np.float32)
    key = (url, outputs, tuple(image_shape), num_classes)
    if store and key in _answers_to_grey:
        answers.add([hashlib.sha256(grey.tobytes()).digest()], _answers_to_grey.pop(key))
    found = classifier(grey)
    if not store:
        _answers_to_grey[key] = found
    return classifier


# ---- Answers that are known -------------------------------------------------------------------------------------------


class _Answers:
    """Logits by the SHA-256 of their image.

    A file holds the answers to one request, uint8 [B, 32 + 4 K]: of each image its hash and its float32 logits. The file's
    name is the SHA-256 of its content, so a damaged file is known as such; its images are then sent again.
    """

    def __init__(self, store: Path | None, subject: str, num_classes: int):
        self._known: dict[bytes, np.ndarray] = {}
        self._num_classes = num_classes
        self._folder = (
            Path(store) / hashlib.sha256(f"{subject} {num_classes}".encode()).hexdigest()[:32] if store else None
        )
        if self._folder and self._folder.is_dir():
            atomic.remove_remains(self._folder)
            for listed in list_level(self._folder)[1]:
                self._load(listed.path)

    def _load(self, path: Path) -> None:
        try:
            data = read_file(path, _MAXIMUM_STORED_BYTES, "stored answers")
            table = read_npy(data, path)
        except InputError:
            return
        if hashlib.sha256(data).hexdigest() != path.stem or table.dtype != np.uint8:
            return
        if table.ndim == 2 and table.shape[1] == _DIGEST_BYTES + 4 * self._num_classes:
            logits = np.ascontiguousarray(table[:, _DIGEST_BYTES:]).view("<f4")
            self._known |= zip((row.tobytes() for row in table[:, :_DIGEST_BYTES]), logits, strict=True)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def of(self, digests: Sequence[bytes]) -> np.ndarray:
        """Logits, float32 [B, K]."""
        found = np.empty((len(digests), self._num_classes), np.float32)
        for row, digest in enumerate(digests):
            found[row] = self._known[digest]
        return found

    def add(self, digests: Sequence[bytes], logits: np.ndarray) -> None:
        self._known |= zip(digests, logits, strict=True)
        if not self._folder:
            return
        hashes = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
        numbers = np.ascontiguousarray(logits, "<f4").view(np.uint8)
        data = _npy(np.concatenate([hashes, numbers], axis=1))
        try:
            atomic.write_bytes(self._folder / f"{hashlib.sha256(data).hexdigest()}.npy", data)
        except OSError as error:
            raise InputError(f"{self._folder}: the answers cannot be stored ({one_line(error)})") from error


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# ---- One request ------------------------------------------------------------------------------------------------------


def _read_address(url: str) -> _Address:
    form = "should be http://HOST:PORT/PATH or https://..."
    if not url.isprintable() or " " in url or not url.isascii():
        raise InputError(f"{one_line(url)!r}: has characters that no address has; {form}")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the system is given it; an empty or a long label has no such form
    except ValueError as error:
        raise InputError(f"{url}: is no address ({one_line(error)}); {form}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url}: is no address; {form}")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"{parts.hostname}: the address has a user name or a password, which would be written to files of the run; {form}"
        )
    wanted = urllib.parse.parse_qs(parts.query).get("format", ["npy"])[-1]
    if wanted not in ("npy", "json"):
        raise InputError(f"{url}: format {wanted!r} is not one of npy, json")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Address(parts.scheme == "https", parts.hostname, port, target, NPY if wanted == "npy" else JSON)


def _ask(
    url: str,
    address: _Address,
    images: np.ndarray,
    num_classes: int,
    outputs: Outputs,
    time_limit: float,
    waits: Sequence[float],
) -> np.ndarray:
    """The logits of a batch, float32 [B, K], after at most 1 + len(waits) requests."""
    body = _npy(images) if address.content_type == NPY else json.dumps({"images": images.tolist()}).encode()
    most = _BYTES_BESIDE + images.shape[0] * (num_classes + 1) * _BYTES_OF_A_NUMBER[address.content_type]
    for number in range(len(waits) + 1):
        try:
            answer = _request(url, address, body, most, time_limit)
            break
        except _Retry as error:
            if number == len(waits):
                times = f"{number + 1} times" if number else "once"
                raise InputError(f"{url}: {error}; tried {times}") from error
            time.sleep(waits[number])
    found = read_npy(answer, url) if address.content_type == NPY else _read_json(answer, url, outputs)
    is_label = outputs == "labels" and found.shape == (len(images),)
    if found.dtype.kind not in "iuf" or not (is_label or found.shape == (len(images), num_classes)):
        shapes = f"{[len(images), num_classes]}" + (f" or {[len(images)]}" if outputs == "labels" else "")
        raise InputError(
            f"{url}: answered {found.dtype} {list(found.shape)}; {outputs} of these images are numbers {shapes}"
        )
    try:
        with np.errstate(over="ignore"):
            logits = as_logits(found, outputs, num_classes).astype(np.float32)
    except InputError as error:
        raise InputError(f"{url}: {error}") from error
    if not np.isfinite(logits).all():  # before they are stored
        raise InputError(f"{url}: answered numbers that are not finite")
    return logits


def _request(url: str, address: _Address, body: bytes, most: int, time_limit: float) -> bytes:
    """The body of the answer, of at most `most` bytes.

    Raises:
        _Retry: the connection failed, or the server has a status of 500 or more.
        InputError: anything else.
    """
    kind = http.client.HTTPSConnection if address.is_encrypted else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=time_limit)
    connection.response_class = _Response
    headers = {"Content-Type": address.content_type, "Accept": address.content_type, "Connection": "close"}
    is_over = threading.Event()
    try:
        with contextlib.closing(connection):
            connection.connect()
            with _deadline(connection.sock, time_limit) as is_over:
                connection.request("POST", address.target, body, headers)
                with contextlib.closing(connection.getresponse()) as response:
                    data = _read_body(url, address, response, most)
        if is_over.is_set():  # what was read is only its beginning
            raise TimeoutError
        return data
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if is_over.is_set() or isinstance(error, TimeoutError):
            raise InputError(f"{url}: no answer within {time_limit:g} seconds") from error
        if isinstance(error, (OSError, http.client.IncompleteRead)):
            raise _Retry(f"the connection failed ({_shown(error)})") from error
        raise InputError(f"{url}: the answer is not HTTP ({_shown(error)})") from error


def _read_body(url: str, address: _Address, response: http.client.HTTPResponse, most: int) -> bytes:
    reason = _shown(response.reason)
    if response.status >= 500:
        raise _Retry(f"the server failed with status {response.status} {reason}")
    if 300 <= response.status < 400:
        raise InputError(
            f"{url}: redirects to {_shown(response.getheader('Location', 'nowhere'))}; redirects are not followed, so give the "
            "right address itself"
        )
    if response.status != 200:
        raise InputError(f"{url}: answers with status {response.status} {reason}; should be 200")
    _check_type(url, address, response.getheader("Content-Type", ""))
    if response.length is not None and response.length > most:
        raise InputError(f"{url}: answers with {response.length} bytes; {most} are enough for these images")
    data = response.read(most + 1)
    if len(data) > most:
        raise InputError(f"{url}: answers with more than {most} bytes, which are enough for these images")
    if response.length:
        raise _Retry(f"the answer ended {response.length} bytes too early")
    return data


@contextlib.contextmanager
def _deadline(connected: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Ends a connection after some time, even if bytes keep coming; the event says whether that happened."""
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with contextlib.suppress(OSError):  # already closed
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()


def _check_type(url: str, address: _Address, content_type: str) -> None:
    found = content_type.partition(";")[0].strip().lower()
    if found and found not in (address.content_type, "application/octet-stream"):
        other = "; use ?format=json" if found == JSON else ""
        raise InputError(f"{url}: answers with {_shown(found)}; should be {address.content_type}{other}")


def _read_json(data: bytes, url: str, key: str) -> np.ndarray:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}: answered no JSON ({_shown(error)})") from error
    if not isinstance(answer, dict):
        raise InputError(f'{url}: answered a {type(answer).__name__}; should be {{"{key}": [...]}}')
    if key not in answer:
        raise InputError(
            f'{url}: answered an object with {_shown(", ".join(answer) or "nothing")}; should be {{"{key}": [...]}}'
        )
    try:
        return np.array(answer[key], float)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{url}: answered {key} that are no array of numbers ({_shown(error)})") from error


def _shown(text: object) -> str:
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in one_line(text))
    return line if len(line) <= 100 else f"{line[:99]}…"
