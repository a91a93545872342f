import contextlib
import io
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bdjax.defenses.teachers import ask, from_classifiers
from bdjax.errors import InputError
from bdjax.exchange.http import BATCH_SIZE, connect

SHAPE, CLASSES = (4, 3, 1), 3
IMAGES = np.random.default_rng(0).random((9, *SHAPE), np.float32)
KERNEL = np.random.default_rng(1).standard_normal((math.prod(SHAPE), CLASSES)).astype(np.float32)
NPY, JSON, HTML = "application/x-npy", "application/json", "text/html"


def network(images):
    return images.reshape(len(images), -1) @ KERNEL


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Answers each request by the next of `answers`, the last of them for ever; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endless = 0
        self.answers, self.received = list(answers), []
        self.url = f"http://127.0.0.1:{self.server_port}/predict"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"] == NPY:
            images = np.load(io.BytesIO(body), allow_pickle=False)
        else:
            images = np.array(json.loads(body)["images"], np.float32)
        self.server.received.append((self.path, images))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self, images)

    do_GET = do_POST

    def reply(self, body, content_type=NPY, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def right(handler, images):
    handler.reply(npy(network(images)))


def right_json(handler, images):
    handler.reply(json.dumps({"logits": network(images).tolist()}).encode(), JSON + "; charset=utf-8")


def fails(handler, images):
    handler.reply(b"busy", "text/plain", 503)


def hangs_up(handler, images):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve():
    servers = []

    def serve(*answers):
        server = Server(answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(server):
    """The images of each request, without the first grey one."""
    return [images for _, images in server.received if not (images == 0.5).all()]


@pytest.mark.parametrize(("query", "answer"), [("", right), ("?format=npy", right), ("?a=1&format=json", right_json)])
def test_both_formats(serve, query, answer):
    server = serve(answer)
    classifier = connect(server.url + query, CLASSES, SHAPE)
    np.testing.assert_allclose(classifier(IMAGES), network(IMAGES), rtol=1e-5)
    assert classifier.__name__ == server.url + query
    assert {path for path, _ in server.received} == {f"/predict{query}"}
    np.testing.assert_array_equal(asked(server)[0], IMAGES)
    assert asked(server)[0].dtype == np.float32


def test_images_are_sent_in_batches_and_never_twice(serve):
    server = serve(right)
    classifier = connect(server.url, CLASSES, SHAPE, batch_size=4)
    shuffled = np.concatenate([IMAGES[::-1], IMAGES[:3]])
    np.testing.assert_allclose(classifier(shuffled), network(shuffled), rtol=1e-5)
    assert [len(images) for images in asked(server)] == [4, 4, 1]
    np.testing.assert_allclose(classifier(IMAGES), network(IMAGES), rtol=1e-5)
    assert len(asked(server)) == 3
    assert BATCH_SIZE > 1


def test_a_later_process_asks_only_for_what_is_not_stored(serve, tmp_path):
    first = serve(right, right, right, hangs_up)  # the grey image and two batches
    with pytest.raises(InputError, match="the connection failed"):
        connect(first.url, CLASSES, SHAPE, store=tmp_path / "answers", batch_size=3, waits=())(IMAGES)
    files = sorted((tmp_path / "answers").rglob("*.npy"))
    assert len(files) == 3
    first.answers[:] = [right]
    first.received.clear()
    classifier = connect(first.url, CLASSES, SHAPE, store=tmp_path / "answers", batch_size=3)
    np.testing.assert_allclose(classifier(IMAGES), network(IMAGES), rtol=1e-5)
    assert len(first.received) == 1
    np.testing.assert_array_equal(first.received[0][1], IMAGES[6:])
    for file in files:  # damaged answers are asked for again
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    first.received.clear()
    np.testing.assert_allclose(connect(first.url, CLASSES, SHAPE, store=tmp_path / "answers")(IMAGES), network(IMAGES))
    assert [len(images) for _, images in first.received] == [1, 6]


def test_an_address_that_is_checked_before_its_folder_is_known_gets_the_grey_image_once(serve, tmp_path):
    server = serve(right)
    for number, store in enumerate([None, tmp_path / "a", tmp_path / "a", None, tmp_path / "b", tmp_path / "c"]):
        connect(server.url, CLASSES, SHAPE, store=store)
        # A folder that has the answer, or follows a check, sends nothing; every check and every other folder does.
        assert len(server.received) == [1, 1, 1, 2, 2, 3][number]
    assert len(list((tmp_path / "a").rglob("*.npy"))) == len(list((tmp_path / "b").rglob("*.npy"))) == 1


def test_answers_of_other_addresses_and_outputs_are_not_used(serve, tmp_path):
    def probabilities(handler, images):
        handler.reply(npy(np.full((len(images), CLASSES), 1 / CLASSES)))

    server, other = serve(probabilities), serve(probabilities)
    for url, outputs in ((server.url, "logits"), (server.url, "probabilities"), (other.url, "logits")):
        connect(url, CLASSES, SHAPE, outputs=outputs, store=tmp_path)
    assert len(server.received) == 2 and len(other.received) == 1


@pytest.mark.parametrize("form", ["numbers", "one-hots", "json"])
def test_labels(serve, form):
    def label(handler, images):
        labels = network(images).argmax(1)
        if form == "json":
            handler.reply(json.dumps({"labels": labels.tolist()}).encode(), JSON)
        else:
            handler.reply(npy(labels if form == "numbers" else np.eye(CLASSES)[labels]))

    url = serve(label).url + ("?format=json" if form == "json" else "")
    found = connect(url, CLASSES, SHAPE, outputs="labels")(IMAGES)
    np.testing.assert_array_equal(found.argmax(1), network(IMAGES).argmax(1))


@pytest.mark.parametrize("failure", [fails, hangs_up])
def test_a_server_that_fails_twice_is_asked_again(serve, failure):
    server = serve(failure, failure, right)
    classifier = connect(server.url, CLASSES, SHAPE, waits=(0.01, 0.01))
    assert len(server.received) == 3
    np.testing.assert_allclose(classifier(IMAGES), network(IMAGES), rtol=1e-5)


def test_repetitions_end(serve):
    server = serve(fails)
    with pytest.raises(InputError, match="the server failed with status 503 Service Unavailable; tried 3 times$"):
        connect(server.url, CLASSES, SHAPE, waits=(0.01, 0.01))
    assert len(server.received) == 3


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        with pytest.raises(InputError, match=f"^{url}: the connection failed .*; tried 2 times"):
            connect(url, CLASSES, SHAPE, waits=(0.01,))


def sends(data):
    def answer(handler, images):
        handler.wfile.write(data)
        handler.close_connection = True

    return answer


def never(handler, images):
    time.sleep(1)


def drips(handler, images):
    """A byte now and then keeps every single read within its time."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\n\r\n")
    for _ in range(40):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def chunk(size):
    """An answer without an end, of a single chunk that claims to have a size."""

    def answer(handler, images):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n" % size)
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b" " * 9999)
                handler.server.endless += 9999

    return answer


def replies(body, *arguments, **headers):
    return lambda handler, images: handler.reply(body, *arguments, **headers)


RIGHT = npy(np.zeros((1, CLASSES), np.float32))
BIG_CLAIM = npy(np.zeros(3, np.float32)).replace(b"(3,), }          ", b"(3000000000,), } ")
WRONG = {
    "web page": (replies(b"<html>", HTML), "", "answers with text/html; should be application/x-npy$"),
    "json for npy": (
        replies(b"{}", JSON),
        "",
        r"answers with application/json; should be application/x-npy; use \?format=js",
    ),
    "html as npy": (replies(b"<html>"), "", "is no intact array in NumPy's .npy format"),
    "nothing": (replies(b""), "", "is no intact array in NumPy's .npy format"),
    "pickle": (replies(npy(np.array([[None] * 3]))), "", "is an array of objects, which are pickles"),
    "big claim": (replies(BIG_CLAIM), "", "is no intact array .*bytes of data, but its header says"),
    "wrong shape": (
        replies(npy(np.zeros((1, 4)))),
        "",
        r"answered float64 \[1, 4\]; logits of these images are numbers \[1, 3\]",
    ),
    "wrong rows": (replies(npy(np.zeros((2, 3)))), "", r"answered float64 \[2, 3\]"),
    "truth": (replies(npy(np.zeros((1, 3), bool))), "", r"answered bool \[1, 3\]"),
    "not finite": (replies(npy(np.full((1, 3), np.nan))), "", "answered numbers that are not finite"),
    "beyond float32": (replies(npy(np.full((1, 3), 1e300))), "", "answered numbers that are not finite"),
    "never": (never, "", "no answer within 0.3 seconds"),
    "drips": (drips, "", "no answer within 0.3 seconds"),
    "too large": (replies(b" " * 99_999), "", "answers with 99999 bytes; 4128 are enough for these images"),
    "too large without a length": (
        sends(b"HTTP/1.0 200 OK\r\n\r\n" + b" " * 99_999),
        "",
        "answers with more than 4128 bytes",
    ),
    "2 GB claimed": (
        sends(b"HTTP/1.0 200 OK\r\nContent-Length: 2147483648\r\n\r\n"),
        "",
        "answers with 2147483648 bytes",
    ),
    "2 GB chunk": (
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n80000000\r\n" + b" " * 9999),
        "",
        "answers with more than 4128 bytes",
    ),
    "endless chunk": (chunk(b"-1"), "", r"the answer is not HTTP \(a chunk of -1 bytes\)"),
    "negative chunk": (chunk(b"-5"), "", r"the answer is not HTTP \(a chunk of -5 bytes\)"),
    "no size of a chunk": (chunk(b"many"), "", "tried once"),
    "cut off": (sends(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n" + RIGHT[:50]), "", "tried once"),
    "not HTTP": (sends(b"220 mail\x1b[31m\r\n\r\n"), "", "the answer is not HTTP"),
    "long header": (
        sends(b"HTTP/1.0 200 " + b"x" * 99_999 + b"\r\n"),
        "",
        r"is not HTTP \(got more than 65536 bytes when",
    ),
    "redirect": (
        replies(b"", status=302, Location="http://169.254.169.254/\x1b[31m"),
        "",
        "redirects to http://169.254.169.254/.*; redirects are not followed",
    ),
    "not found": (replies(b"", status=404), "", "answers with status 404 Not Found; should be 200"),
    "no json": (replies(b"<html>", JSON), "?format=json", r"answered no JSON \(Expecting value"),
    "deep json": (replies(b"[" * 4000, JSON), "?format=json", "answered no JSON"),
    "other json": (replies(b"[1]", JSON), "?format=json", r'answered a list; should be \{"logits": \[...\]\}'),
    "other key": (replies(b'{"a\\u001b": 1}', JSON), "?format=json", "answered an object with a�; should be"),
    "no key": (replies(b"{}", JSON), "?format=json", "answered an object with nothing; should be"),
    "uneven": (
        replies(b'{"logits": [[1, 2], [1]]}', JSON),
        "?format=json",
        "answered logits that are no array of numbers",
    ),
    "text": (
        replies(b'{"logits": [["a", 2, 3]]}', JSON),
        "?format=json",
        "answered logits that are no array of numbers",
    ),
    "json nan": (
        replies(b'{"logits": [[NaN, 1e999, 3]]}', JSON),
        "?format=json",
        "answered numbers that are not finite",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_one_line_and_not_repeated(serve, kind):
    answer, query, message = WRONG[kind]
    server = serve(answer)
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        connect(server.url + query, CLASSES, SHAPE, time_limit=0.3, waits=())
    assert time.monotonic() - start < 1
    assert str(caught.value).startswith(server.url) and str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert len(server.received) == 1
    assert server.endless < 1 << 24  # what the system buffers


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://a/b", "is no address; should be http://HOST:PORT/PATH"),
        ("http:///b", "is no address"),
        ("http://a:99999/b", "is no address"),
        ("http://a:b/b", "is no address"),
        ("http://[::1/b", "is no address"),
        ("http://a..b/", r"is no address \(.*label"),
        (f"http://{'a' * 64}.org/", r"is no address \(.*label"),
        ("http://a/b c", "has characters that no address has"),
        ("http://a/b\r\nHost: c", "has characters that no address has"),
        ("http://user:secret@a/b", "^a: the address has a user name or a password"),
        ("http://a/b?format=xml", "format 'xml' is not one of npy, json"),
    ],
)
def test_what_is_no_address_is_one_line(url, message):
    with pytest.raises(InputError, match=message) as caught:
        connect(url, CLASSES, SHAPE)
    assert "secret" not in str(caught.value) and str(caught.value).isprintable()


def test_a_teacher_that_fails_later_is_named(serve):
    server = serve(right, replies(b"", status=404), right, replies(b"", status=404))
    teacher = from_classifiers([connect(server.url, CLASSES, SHAPE, waits=())], CLASSES)
    with pytest.raises(InputError, match=rf"^teacher 1 \({server.url}\): answers with status 404"):
        teacher(np.zeros((2, *SHAPE), np.uint8))
    with pytest.raises(InputError, match=f"^{server.url}: answers with status 404"):
        ask(connect(server.url, CLASSES, SHAPE, waits=()), np.zeros((2, *SHAPE), np.uint8), CLASSES, server.url)
