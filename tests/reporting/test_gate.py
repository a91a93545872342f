import hashlib
import json

import pytest

from bdjax.datasets.files import read_file
from bdjax.errors import InputError
from bdjax.reporting.evidence import gate
from bdjax.reporting.evidence.verdict import NAME, VERSION, WORDS
from bdjax.reporting.evidence.writing import SUMS


def test_the_checksum_is_of_the_bytes_that_are_decided_on(tmp_path, monkeypatch):
    """Though the file is put right between the two reads."""
    path = tmp_path / "verdict.json"
    verdict = {"schema": NAME, "schema_version": VERSION, "verdict": {"word": WORDS[0]}, "metrics": []}
    right = json.dumps(verdict).encode()
    (tmp_path / SUMS).write_text(f"{hashlib.sha256(right).hexdigest()}  verdict.json\n")
    path.write_bytes(right + b" ")

    def put_right(*arguments):
        path.write_bytes(right)
        return read_file(*arguments)

    monkeypatch.setattr(gate, "read_file", put_right)
    with pytest.raises(InputError, match="is not the file that SHA256SUMS beside it names"):
        gate.read(path)
    assert gate.read(path) == verdict
