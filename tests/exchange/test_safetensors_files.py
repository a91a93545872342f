"""What safetensors files may not be. Each refusal is one line that names the file, and comes at once."""

import json
import os
import pickle
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.exchange import safetensors_files

WEIGHTS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array([1, 2], np.float32)}


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(1,), start=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def tensors_in(path):
    with safetensors_files.opened(path) as file:
        return {name: file.read(name) for name in file.tensors}


def refusal(path):
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        tensors_in(path)
    assert time.monotonic() - began < 3
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and message.isprintable()
    return message


def test_what_was_written_is_read_and_the_library_reads_it_too(tmp_path):
    path = tmp_path / "a.safetensors"
    digest = safetensors_files.write(path, WEIGHTS)
    found = tensors_in(path)
    assert found.keys() == WEIGHTS.keys() and all(np.array_equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    library = safetensors_files.safetensors.numpy.load_file(path)
    assert all(np.array_equal(library[name], WEIGHTS[name]) for name in WEIGHTS)
    with safetensors_files.opened(path) as file:
        assert file.sha256() == digest


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_precisions_become_float32(tmp_path, dtype):
    path, values = tmp_path / "a.safetensors", np.array([[0.5, -1.25]], dtype)
    path.write_bytes(safetensors_files.safetensors.numpy.save({"a": values}))
    assert tensors_in(path)["a"].dtype == np.float32
    assert np.array_equal(tensors_in(path)["a"], np.float32([[0.5, -1.25]]))


def test_counters_of_torch_are_left_out_and_other_integers_refused(tmp_path):
    counter, data = np.array(7, np.int64), np.zeros(1, np.float32)
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_files.safetensors.numpy.save({"bn.num_batches_tracked": counter, "a": data}))
    assert list(tensors_in(path)) == ["a"]
    path.write_bytes(safetensors_files.safetensors.numpy.save({"steps": counter}))
    assert "'steps' has dtype 'I64'; weights are F64, F32, F16, BF16" in refusal(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(start=4, end=8)}, b"\0" * 8, "'a' begins at byte"),
        ({"a": entry(), "b": entry(start=0)}, b"\0" * 4, "should follow the tensor before it"),
        ({"a": entry(end=8)}, b"\0" * 8, "'a' has 8 bytes; F32 [1] has 4"),
        ({"a": entry(shape=(2**40,), end=2**42)}, b"\0" * 4, "so it is damaged or cut off"),
        ({"a": entry(shape=(-1,))}, b"\0" * 4, "shape [-1]; should be"),
        ({"a": entry(shape=(True,))}, b"\0" * 4, "shape [True]; should be"),
        ({"a": entry(shape=(1,) * 9)}, b"\0" * 4, "at most 8 whole numbers"),
        ({"a": entry(dtype="I8", end=1)}, b"\0", "weights are F64, F32, F16, BF16"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 4, "weights are F64, F32, F16, BF16"),
        ({"a": {**entry(), "code": "x"}}, b"\0" * 4, "should be described by dtype, shape and data_offsets"),
        ({"a": entry()}, b"\0" * 5, "so it is damaged or cut off"),
        ({"a": entry()}, b"\0" * 3, "so it is damaged or cut off"),
        ({"a": entry(start=4, end=0)}, b"\0" * 4, "'a' has -4 bytes"),
        ({"a": [1, 2]}, b"", "should be described by"),
        ([1, 2], b"", "the header is a list"),
        (b'{"a": 1, "a": 1}', b"", "a name occurs twice"),
        (b"[" * 100_000, b"", "the header is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "the header is not JSON"),
        (b"\xff\xfe", b"", "the header is not JSON"),
        ({"\x1b[31m\u202e": entry(end=8)}, b"\0" * 8, r"'\x1b[31m\u202e' has 8 bytes"),
        ({"x" * 10_000: entry(end=8)}, b"\0" * 8, "… has 8 bytes"),
        ({"a": entry()}, np.float32(np.nan).tobytes(), "'a' has values that are not finite"),
        ({"a": entry("F64", end=8)}, np.float64(1e300).tobytes(), "'a' has values that are not finite"),
    ],
)
def test_damaged_files(tmp_path, header, data, message):
    assert message in refusal(file_of(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize("length", [2**31, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_larger_than_the_file(tmp_path, length):
    path = file_of(tmp_path / "a.safetensors", b"{}", length=length)
    assert f"its header would have {length} bytes of 10" in refusal(path)


def test_a_header_that_is_too_large_and_a_file_that_is_too_large(tmp_path):
    path = file_of(tmp_path / "a.safetensors", b"{}", length=2**30)
    os.truncate(path, 2**31)
    assert f"its header has {2**30} bytes" in refusal(path)
    os.truncate(path, 2**40)
    assert "files of weights have at most" in refusal(path)


def test_a_header_of_too_many_tensors(tmp_path):
    many = {f"t{number}": 0 for number in range(20_000)}
    assert "has 20000 tensors" in refusal(file_of(tmp_path / "a.safetensors", many))


@pytest.mark.parametrize("size", [0, 1, 8, 9])
def test_files_that_are_too_short(tmp_path, size):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\0" * size)
    assert f"has {size} bytes" in refusal(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_pickles_under_any_name_are_refused_with_the_command_that_converts_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, archive = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain.write_bytes(pickle.dumps(Evil(), 4))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))
    empty = tmp_path / "c.pth"
    empty.write_bytes(b"")
    for path in (plain, archive, empty):
        message = refusal(path)
        assert "is a pickle, which can run code, and is not read" in message
        assert f"torch.load('{path.name}', map_location='cpu', weights_only=True)" in message
        assert f"'{path.stem}.safetensors')\"" in message
    assert not (tmp_path / "evil").exists()


def test_the_command_quotes_nothing_of_a_name(tmp_path):
    path = tmp_path / "a'$(touch evil)`\".pt"
    command = safetensors_files.conversion(path)
    assert command.count("'") == 6 and "$(" not in command and "`" not in command


def test_what_is_no_regular_file(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is not a regular file" in refusal(pipe)
    assert "cannot be read" in refusal(tmp_path / "none.safetensors")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is not a regular file" in refusal(folder)
