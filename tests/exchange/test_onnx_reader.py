import functools
import io
import pickle
import time
import zipfile

import numpy as np
import pytest

from bdjax import extras
from bdjax.defenses.teachers import ask, from_classifiers
from bdjax.errors import InputError
from bdjax.exchange import onnx_reader
from bdjax.exchange.onnx_reader import read

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
h, Tensor = onnx.helper, onnx.TensorProto
array = onnx.numpy_helper.from_array

SHAPE, CLASSES = (6, 5, 3), 4
IMAGES = np.random.default_rng(0).random((7, *SHAPE), np.float32)
KERNEL = np.random.default_rng(1).standard_normal((3, CLASSES)).astype(np.float32)


def expected(images):
    return images.mean((1, 2)) @ KERNEL


def model(batch="n", layout="nchw", nodes=None, arrays=(), inputs=None, outputs=None, element=Tensor.FLOAT, domains=()):
    """Means of the channels and a matrix, or other nodes from "images" to "logits"."""
    axes = [2, 3] if layout == "nchw" else [1, 2]
    sides = (3, 6, 5) if layout == "nchw" else SHAPE
    usual = [
        h.make_node("ReduceMean", ["images"], ["means"], axes=axes, keepdims=0),
        h.make_node("MatMul", ["means", "kernel"], ["logits"]),
    ]
    graph = h.make_graph(
        nodes or usual,
        "classifier",
        inputs or [h.make_tensor_value_info("images", element, [batch, *sides])],
        outputs or [h.make_tensor_value_info("logits", element, [batch, CLASSES])],
        [array(KERNEL.astype(h.tensor_dtype_to_np_dtype(element)), "kernel"), *arrays],
    )
    opsets = [h.make_opsetid("", 17), *(h.make_opsetid(domain, 1) for domain in domains)]
    return h.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "network.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("batch", ["n", 1, 3, 7, 10])
def test_images_are_given_in_the_models_layout_and_batch_size(write, layout, batch):
    classifier = read(write(model(batch, layout)), CLASSES, SHAPE)
    assert classifier.__name__ == "network.onnx"
    np.testing.assert_allclose(classifier(IMAGES), expected(IMAGES), atol=1e-5)


@pytest.mark.parametrize("element", [Tensor.FLOAT16, Tensor.DOUBLE])
def test_other_floating_point_numbers(write, element):
    classifier = read(write(model(element=element)), CLASSES, SHAPE)
    np.testing.assert_allclose(classifier(IMAGES), expected(IMAGES), atol=5e-3)


def test_normalisation_comes_first(write):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    classifier = read(write(model()), CLASSES, SHAPE, mean=mean, std=std)
    np.testing.assert_allclose(classifier(IMAGES), expected((IMAGES - mean) / std), rtol=1e-4)
    single = read(write(model()), CLASSES, SHAPE, mean=0.5, std=[0.25])
    np.testing.assert_allclose(single(IMAGES), expected((IMAGES - 0.5) / 0.25), rtol=1e-4)
    for wrong, message in (
        ({"mean": (1, 2)}, "2 means and 3 deviations; images have 3 channels"),
        ({"std": 0}, "std positive"),
    ):
        with pytest.raises(InputError, match=message):
            read(write(model()), CLASSES, SHAPE, **wrong)


def test_an_ambiguous_layout_needs_a_setting(write):
    image = h.make_tensor_value_info("images", Tensor.FLOAT, ["n", "a", "b", "c"])
    path = write(model(inputs=[image]))
    with pytest.raises(
        InputError, match=r"images \[\?, \?, \?, \?\] may be channels first or last; set layout to nchw or"
    ):
        read(path, CLASSES, SHAPE)
    np.testing.assert_allclose(read(path, CLASSES, SHAPE, layout="nchw")(IMAGES), expected(IMAGES), atol=1e-5)
    with pytest.raises(InputError, match=r"images \[\?, 3, 6, 5\] does not fit the data's images of shape \[6, 5, 3\]"):
        read(write(model()), CLASSES, SHAPE, layout="nhwc")


def test_one_of_several_outputs_is_chosen(write):
    outputs = [h.make_tensor_value_info(name, Tensor.FLOAT, ["n", k]) for name, k in (("means", 3), ("logits", 4))]
    path = write(model(outputs=outputs))
    with pytest.raises(
        InputError, match=r"has 2 outputs, means \[\?, 3\], logits \[\?, 4\]; set output to the name of the"
    ):
        read(path, CLASSES, SHAPE)
    with pytest.raises(InputError, match="has 2 outputs, .*; none is named other$"):
        read(path, CLASSES, SHAPE, output="other")
    np.testing.assert_allclose(read(path, CLASSES, SHAPE, output="logits")(IMAGES), expected(IMAGES), atol=1e-5)


def test_labels_and_probabilities(write):
    softmax = h.make_node("Softmax", ["l"], ["logits"])
    nodes = [*model().graph.node[:1], h.make_node("MatMul", ["means", "kernel"], ["l"]), softmax]
    classifier = read(write(model(nodes=nodes)), CLASSES, SHAPE, outputs="probabilities")
    difference = classifier(IMAGES) - expected(IMAGES)
    np.testing.assert_allclose(difference, np.repeat(difference[:, :1], CLASSES, 1), atol=1e-5)
    nodes[-1] = h.make_node("ArgMax", ["l"], ["logits"], axis=1, keepdims=0)
    labels = write(model(nodes=nodes, outputs=[h.make_tensor_value_info("logits", Tensor.INT64, ["n"])]))
    classifier = read(labels, CLASSES, SHAPE, outputs="labels")
    np.testing.assert_array_equal(classifier(IMAGES).argmax(1), expected(IMAGES).argmax(1))
    with pytest.raises(InputError, match=r"output logits \[\?\] should be \[images, 4\]"):
        read(labels, CLASSES, SHAPE)
    with pytest.raises(InputError, match=r"network.onnx: it returned numbers that are no probabilities: row 0"):
        read(write(model()), CLASSES, SHAPE, outputs="probabilities")


def test_numbers_that_are_not_finite_name_the_file(write):
    nodes = [
        *model().graph.node[:1],
        h.make_node("Log", ["means"], ["l"]),
        h.make_node("MatMul", ["l", "kernel"], ["logits"]),
    ]
    teacher = from_classifiers([read(write(model(nodes=nodes)), CLASSES, SHAPE)], CLASSES)
    with pytest.raises(InputError, match=r"^teacher 1 \(network.onnx\) returned logits that are not finite .* image 0"):
        teacher(np.zeros((2, *SHAPE), np.uint8))


def test_an_error_names_the_file_once():
    def fails(images):
        raise InputError("models/a.onnx: ONNX Runtime failed")

    for name in ("models/a.onnx", "models/a.onnx:imagenet"):
        with pytest.raises(InputError, match=f"^{name}: ONNX Runtime failed$"):
            ask(fails, np.zeros((2, *SHAPE), np.uint8), CLASSES, name)


def test_a_missing_library_is_one_line(write, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"need onnxruntime, which is not installed: pip install 'bdjax\[onnx\]'$"):
        read(write(model()), CLASSES, SHAPE)


# ---- Hostile files ----------------------------------------------------------------------------------------------------


def edited(change, **settings):
    made = model(**settings)
    change(made)
    return made


def before_the_usual(*nodes, **settings):
    """Other nodes from "images" to "x", then the usual ones."""
    usual = [h.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0), model().graph.node[1]]
    return model(nodes=[*nodes, *usual], **settings)


def loop(depth=1):
    condition = h.make_tensor_value_info("c", Tensor.BOOL, [])
    step = h.make_tensor_value_info("i", Tensor.INT64, [])
    body = h.make_graph([h.make_node("Identity", ["c"], ["c2"])], "body", [step, condition], [condition])
    return before_the_usual(h.make_node("Loop", ["m", "c", "images"], ["x"], body=body))


def external(made):
    onnx.external_data_helper.set_external_data(made.graph.initializer[0], "/etc/passwd")
    made.graph.initializer[0].ClearField("raw_data")
    made.graph.initializer[0].data_location = Tensor.EXTERNAL


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"")
    return buffer.getvalue()


def bomb(count):
    shape = array(np.array([count], np.int64), "shape")
    zeros = h.make_node("ConstantOfShape", ["shape"], ["zeros"])
    nodes = [
        zeros,
        h.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        h.make_node("Add", ["images", "zero"], ["x"]),
    ]
    return before_the_usual(*nodes, arrays=[shape])


def dims(*sides):
    return lambda made: (made.graph.initializer[0].ClearField("dims"), made.graph.initializer[0].dims.extend(sides))


def nested(depth):
    """A length-delimited field in itself, `depth` times: graph > node > attribute > graph > ..."""
    data = b""
    for level in range(depth):
        tag = (b"\x0a", b"\x2a", b"\x32")[level % 3] if level else b"\x3a"
        length, size = b"", len(data)
        while True:
            length += bytes([(size & 127) | (128 if size > 127 else 0)])
            size >>= 7
            if not size:
                break
        data = tag + length + data
    return data


GOOD = model().SerializeToString()
HOSTILE = {
    "nothing": (b"", "is no ONNX model: it has no operators"),
    "truncated": (GOOD[:-40], "is no intact ONNX model"),
    "noise": (bytes(range(255, 0, -1)) * 40, "is no intact ONNX model"),
    "text": (b"a model " * 99, "is no (intact )?ONNX model"),
    "deeply nested": (nested(30_000), "is no (intact )?ONNX model"),
    "pickle": (pickle.dumps({"weights": 1}), "is a pickle, which could run any code; should be an ONNX model"),
    "zip": (zipped(), "is a zip archive, as PyTorch's torch.save writes; should be an ONNX model"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}" + b" " * 9, "is a safetensors file; should be an ONNX model"),
    "web page": (b"<!DOCTYPE html>", "is a text, as a web page is"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    "2 GB in the protocol": (b"\x08\x08\x3a\xff\xff\xff\xff\x07", "is no intact ONNX model"),
    "2 GB in a shape": (
        edited(dims(1 << 14, 1 << 15)),
        r"kernel has 48 bytes .* its shape \[16384, 32768\] needs 2147483648",
    ),
    "2^60 in a shape": (edited(dims(1 << 30, 1 << 30)), "kernel has 48 bytes of data"),
    "negative shape": (edited(dims(-3, -4)), r"kernel has shape \[-3, -4\]"),
    "many axes": (edited(dims(*[1] * 100_000)), r"kernel has shape \[1, 1, .*; at most 8 dimensions"),
    "wrong type": (edited(lambda made: setattr(made.graph.initializer[0], "data_type", 99)), "has the unknown type 99"),
    "8 GB when run": (bomb(1 << 31 if onnx_reader.free_memory() < 1 << 33 else 1 << 45), "ONNX Runtime"),
    "8 TB when run": (bomb(1 << 41), "ONNX Runtime"),
    "external data": (
        edited(external),
        "kernel lies in another file, which is not read; save the model with its data inside",
    ),
    "loop": (loop(), "has operator Loop, and control flow is not run; export a plain graph"),
    "custom operator": (
        before_the_usual(h.make_node("Run", ["images"], ["x"], domain="evil\x1b[31m"), domains=["evil"]),
        "has operator Run of domain evil�.31m; custom operators are code of other libraries and are not run",
    ),
    "file operator": (
        before_the_usual(h.make_node("ReadFile", ["images"], ["x"])),
        "has operator ReadFile, which is not among those that are run",
    ),
    "random": (
        before_the_usual(h.make_node("RandomNormalLike", ["images"], ["x"])),
        "has operator RandomNormalLike, which is not among those that are run",
    ),
    "random by dropout": (
        before_the_usual(
            h.make_node("Dropout", ["images", "ratio", "training"], ["x"]),
            arrays=[array(np.float32(0.5), "ratio"), array(np.bool_(True), "training")],
        ),
        "has operator Dropout with a training mode, which would make answers random; export the network for inference",
    ),
    "hidden graph": (
        edited(lambda made: made.graph.node[0].attribute.append(h.make_attribute("body", made.graph))),
        "operator ReduceMean has a graph within, which is not run",
    ),
    "function": (
        edited(lambda made: made.functions.append(h.make_function("f", "F", [], [], [], [h.make_opsetid("", 17)]))),
        "has 1 local functions, which are not run; inline them",
    ),
    "cycle": (before_the_usual(h.make_node("Identity", ["means"], ["x"])), "ONNX Runtime does not accept it"),
    "missing array": (before_the_usual(h.make_node("Add", ["images", "no"], ["x"])), "ONNX Runtime does not accept it"),
    "future operators": (
        edited(lambda made: setattr(made.opset_import[0], "version", 999)),
        "ONNX Runtime does not accept it",
    ),
    "many operators": (
        before_the_usual(*[h.make_node("Relu", ["images"], ["x"])] * 30_000),
        "has 30002 operators and 1 arrays; at most 20000 are read",
    ),
    "two inputs": (
        model(inputs=[h.make_tensor_value_info(name, Tensor.FLOAT, ["n", 3, 6, 5]) for name in ("images", "b\n")]),
        r"has 2 inputs, images \[\?, 3, 6, 5\], b \[\?, 3, 6, 5\]; a classifier has one, the images",
    ),
    "flat input": (
        model(inputs=[h.make_tensor_value_info("images", Tensor.FLOAT, ["n", 90])]),
        r"input images \[\?, 90\] should have 4 axes: images, channels, height and width",
    ),
    "integers": (
        model(inputs=[h.make_tensor_value_info("images", Tensor.UINT8, ["n", 3, 6, 5])]),
        "is no array of floating-point numbers, which images are",
    ),
    "another size": (
        model(inputs=[h.make_tensor_value_info("images", Tensor.FLOAT, ["n", 3, 32, 32])]),
        r"input images \[\?, 3, 32, 32\] does not fit the data's images of shape \[6, 5, 3\] .*; --image-size=32 scales",
    ),
    "huge batch": (model(1 << 40), "takes 1099511627776 images at once; at most 4096"),
    "other classes": (
        model(outputs=[h.make_tensor_value_info("logits", Tensor.FLOAT, ["n", 10])]),
        r"output logits \[\?, 10\] should be \[images, 4\], for the data's 4 classes",
    ),
    "unknown other classes": (
        model(
            nodes=[h.make_node("ReduceMean", ["images"], ["logits"], axes=[2, 3], keepdims=0)],
            outputs=[h.make_tensor_value_info("logits", Tensor.FLOAT, ["n", "k"])],
        ),
        r"returns \[1, 3\] for one image; should be \[1, 4\]",
    ),
    "an operator that fails": (
        before_the_usual(
            h.make_node("Shape", ["images"], ["s"]),
            h.make_node("Sub", ["s", "s"], ["z"]),
            h.make_node("Reshape", ["images", "z"], ["y"], allowzero=1),
            h.make_node("Add", ["y", "images"], ["x"]),
        ),
        "ONNX Runtime failed",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_line_within_three_seconds(write, kind, capfd):
    content, message = HOSTILE[kind]
    path = write(content)
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        read(path, CLASSES, SHAPE)
    assert time.monotonic() - start < 3
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(path))
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file_is_one_line(tmp_path):
    for path in (tmp_path / "none.onnx", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match=str(path)):
            read(path, CLASSES, SHAPE)


def test_a_null_byte_in_a_name_is_one_line():
    with pytest.raises(InputError, match=r"^'a\\x00b.onnx': cannot be read \(embedded null byte\)$"):
        read("a\0b.onnx", CLASSES, SHAPE)


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(InputError, match="large.onnx"):
        read(tmp_path / "large.onnx", CLASSES, SHAPE)


@functools.cache
def known_operators():
    return {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}


def test_the_operators_that_are_run_exist_and_have_no_graphs():
    newer = {"Attention", "RMSNormalization", "Swish"}  # than the oldest supported version of onnx; Upsample is older
    assert known_operators() >= onnx_reader.OPERATORS - newer - {"Upsample"}
    graphs = {
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in schema.attributes.values())
    }
    assert graphs and not graphs & onnx_reader.OPERATORS
