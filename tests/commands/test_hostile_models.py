"""Hostile model files through the whole command: one line each, nothing run, nothing written, at most 3 seconds of computing.

The time is that of the process, beside imports and the digits, which the first of these tests would pay for.
"""

import json
import os
import pathlib
import pickle
import struct
import time
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto
from onnx import helper as h

import bdjax
from bdjax.commands import audit_model
from bdjax.errors import InputError
from bdjax.exchange import onnx_reader, saved_model
from bdjax.models import make_model
from bdjax.run.log import StageLog
from bdjax.training import ensemble
from bdjax.workflows import audited_models

MOST_SECONDS = 3


class Evil:
    """An object whose pickle makes a file when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    bdjax.load("digits")
    onnx_reader.extras.onnx()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    """A saved model for the digits, of a network that has learned nothing."""
    model, folder = make_model("lenet", 10, 8), tmp_path_factory.mktemp("models") / "good"
    variables = ensemble.init_members(lambda key: model.init(key, (8, 8, 1)), jax.random.split(jax.random.key(0), 1))
    saved_model.write(folder, saved_model.About(model.architecture, 10, (8, 8, 1)), variables)
    return folder


def changed(good: bytes, change: Callable[[dict[str, np.ndarray]], None]) -> bytes:
    tensors = safetensors.numpy.load(good)
    change(tensors)
    return safetensors.numpy.save(tensors)


def first_kernel(tensors: dict[str, np.ndarray]) -> str:
    return next(name for name in sorted(tensors) if tensors[name].ndim == 4)


def wrong_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors[first_kernel(tensors)] = np.zeros((3, 3), np.float32)


def wrong_dtype(tensors: dict[str, np.ndarray]) -> None:
    name = first_kernel(tensors)
    tensors[name] = tensors[name].astype(np.int8)


def not_finite(tensors: dict[str, np.ndarray]) -> None:
    tensors[first_kernel(tensors)].flat[0] = np.nan


def claims(good: bytes) -> bytes:
    """A tensor of 2 GB in the header of a small file."""
    header = {"a": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 64


WEIGHTS = {
    "truncated": (lambda good: good[: len(good) // 2], "damaged or cut off"),
    "wrong shape": (lambda good: changed(good, wrong_shape), "is [3, 3], should be "),
    "wrong dtype": (lambda good: changed(good, wrong_dtype), "weights are F64, F32, F16, BF16"),
    "not a number": (lambda good: changed(good, not_finite), "has values that are not finite"),
    "2 GB in the header": (claims, "damaged or cut off"),
    "a pickle": (lambda good: pickle.dumps(Evil(), 2), "is a pickle"),
}


def refused(arguments: list[str], capfd) -> str:
    """The error of an audit on the digits; it comes in time, and nothing but it."""
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        audit_model.main(["--preset=quick", "--dataset=digits", "--output=run", *arguments], StageLog())
    assert time.process_time() - start < MOST_SECONDS
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert not pathlib.Path("run").exists() and not pathlib.Path("evil").exists()
    assert capfd.readouterr().err == ""
    return str(caught.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, where it would be seen what a model writes."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_files_of_weights(good, kind, capfd):
    make, message = WEIGHTS[kind]
    pathlib.Path("suspect.safetensors").write_bytes(make((good / saved_model.TENSORS).read_bytes()))
    assert message in refused(["--model=suspect.safetensors:lenet"], capfd)


@pytest.mark.parametrize("kind", ["truncated", "wrong shape", "not a number", "2 GB in the header", "a pickle"])
def test_saved_models(good, kind, capfd):
    folder = pathlib.Path("suspect")
    folder.mkdir()
    (folder / saved_model.ABOUT).write_bytes((good / saved_model.ABOUT).read_bytes())
    (folder / saved_model.TENSORS).write_bytes(WEIGHTS[kind][0]((good / saved_model.TENSORS).read_bytes()))
    assert str(folder / saved_model.TENSORS) in refused(["--model=suspect"], capfd)


def zipped() -> bytes:
    with zipfile.ZipFile("x.zip", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil(), 2))
    return pathlib.Path("x.zip").read_bytes()


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x", "x.onnx", "x.safetensors:lenet"])
@pytest.mark.parametrize("content", [lambda: pickle.dumps(Evil(), 2), zipped], ids=["pickle", "archive of torch.save"])
def test_pickles_under_any_name(name, content, capfd):
    pathlib.Path(name.partition(":")[0]).write_bytes(content())
    message = refused([f"--model={name}"], capfd)
    assert "pickle" in message or "torch.save" in message


def graph(*nodes: onnx.NodeProto, side: int = 64) -> bytes:
    """An ONNX classifier of 8×8 digits, with these nodes from its images to "x"."""
    kernel = onnx.numpy_helper.from_array(np.zeros((64, 10), np.float32), "kernel")
    if side != 64:
        kernel.dims[:] = [side, side]
    usual = [h.make_node("Flatten", ["x"], ["flat"]), h.make_node("MatMul", ["flat", "kernel"], ["logits"])]
    ends = [
        h.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["n", 1, 8, 8]), ("logits", ["n", 10]))
    ]
    made = h.make_graph([*nodes, *usual], "network", ends[:1], ends[1:], [kernel])
    return h.make_model(made, opset_imports=[h.make_opsetid("", 18)]).SerializeToString()


def loop() -> onnx.NodeProto:
    condition = h.make_tensor_value_info("c", TensorProto.BOOL, [])
    count = h.make_tensor_value_info("i", TensorProto.INT64, [])
    body = h.make_graph([h.make_node("Identity", ["c"], ["c2"])], "body", [count, condition], [condition])
    return h.make_node("Loop", ["m", "c", "images"], ["x"], body=body)


PASS = h.make_node("Identity", ["images"], ["x"])
GRAPHS = {
    "truncated": (graph(PASS)[:-40], "is no intact ONNX model"),
    "a loop": (graph(loop()), "has operator Loop, and control flow is not run"),
    "a file operator": (
        graph(h.make_node("ReadFile", ["images"], ["x"])),
        "has operator ReadFile, which is not among those that are run",
    ),
    "2 GB in a shape": (graph(PASS, side=1 << 15), "its shape [32768, 32768] needs"),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_onnx_files(kind, capfd):
    content, message = GRAPHS[kind]
    pathlib.Path("suspect.onnx").write_bytes(content)
    assert message in refused(["--model=suspect.onnx"], capfd)


def test_weights_that_are_not_finite_are_refused_before_the_data_is_read(good, monkeypatch):
    def fail(*_):
        raise AssertionError("the data was read")

    monkeypatch.setattr(audited_models, "load", fail)
    data = changed((good / saved_model.TENSORS).read_bytes(), not_finite)
    pathlib.Path("suspect.safetensors").write_bytes(data)
    folder = pathlib.Path("folder")
    folder.mkdir()
    (folder / saved_model.TENSORS).write_bytes(data)
    for text in ("suspect.safetensors:lenet", "folder"):
        with pytest.raises(InputError, match="values that are not finite"):
            audit_model.main(["--preset=quick", "--dataset=digits", "--output=run", f"--model={text}"], StageLog())
