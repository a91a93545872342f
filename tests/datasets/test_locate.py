import hashlib
import http.server
import pathlib
import re
import threading

import pytest

from bdjax.datasets.locate import DATA_DIR_VARIABLE, RemoteFile, download_hint, fetch, not_found, search_folders
from bdjax.errors import InputError

CONTENT = b"what the publisher offers"
MD5 = hashlib.md5(CONTENT).hexdigest()


class Publisher(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        if not self.path.startswith("/good/"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.requested = []
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_folders_are_searched_in_order(folder, cache, monkeypatch):
    assert search_folders(None) == (cache,)
    monkeypatch.setenv(DATA_DIR_VARIABLE, "/elsewhere")
    assert search_folders(str(folder)) == (folder, pathlib.Path("/elsewhere"), cache)


def test_a_data_dir_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="^data_dir /not/there: no such folder$"):
        search_folders("/not/there")


def test_fetch_takes_the_first_mirror_that_has_the_file_once(server, cache, capfd):
    file = RemoteFile("file.gz", MD5, (f"{server.url}gone/", f"{server.url}good/"))
    paths = fetch([file], "set")
    assert paths == {"file.gz": cache / "set" / "file.gz"}
    assert paths["file.gz"].read_bytes() == CONTENT
    assert server.requested == ["/gone/file.gz", "/good/file.gz"]
    fetch([file], "set")
    assert len(server.requested) == 2
    assert capfd.readouterr() == ("", "")


def test_fetch_says_why_each_mirror_failed(server, cache):
    file = RemoteFile("file.gz", "0" * 32, (f"{server.url}gone/", f"{server.url}good/", "http://127.0.0.1:1/"))
    with pytest.raises(InputError) as caught:
        fetch([file], "set")
    assert str(caught.value) == (
        f"{server.url}gone/file.gz: HTTP status 404; {server.url}good/file.gz: its MD5 is not {'0' * 32}; "
        "http://127.0.0.1:1/file.gz: ConnectionError"
    )
    assert not list((cache / "set").iterdir())


def test_fetch_says_if_the_cache_cannot_be_written(server, cache):
    cache.write_text("a file where the folder should be")
    file = RemoteFile("file.gz", MD5, (f"{server.url}good/",))
    with pytest.raises(InputError, match=re.escape(f"{server.url}good/file.gz: ")):
        fetch([file], "set")


def test_not_found_says_what_where_and_how():
    file = RemoteFile("a.zip", MD5, ("https://publisher/", "https://mirror/"))
    hint = download_hint([file], pathlib.Path("/data/set"), True, "no network")
    error = not_found("set", "a.zip", [pathlib.Path("/data"), pathlib.Path("/cache")], hint)
    assert isinstance(error, InputError)
    assert str(error) == (
        "set: found no a.zip in /data, /cache; the download failed (no network): put a.zip from https://publisher/ into "
        "/data/set"
    )
    assert download_hint([file], pathlib.Path("/data"), False) == (
        "downloads are switched off: put a.zip from https://publisher/ into /data"
    )
