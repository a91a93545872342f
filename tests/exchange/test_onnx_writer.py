import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bdjax.defenses.abm import defended_model
from bdjax.errors import InputError
from bdjax.exchange.onnx_reader import read
from bdjax.exchange.onnx_writer import to_onnx
from bdjax.models import MODELS, as_model, make_model, normalised
from bdjax.models.layers import max_pool_3x3
from bdjax.types import Model, ModelOutput
from tests.shallow import distinct, shallow
from tests.tiers import slow_unless

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

CLASSES = 5


def random_variables(model, image_shape, seed=0):
    """Variables as of a trained network, drawn by NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("variance", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if name == "kernel" else 0.1
        return (deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(data, images):
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0]


def check_written(model, variables, image_shape, data):
    """For one image, and for several; networks treat each row on its own."""
    images = np.random.default_rng(37).random((37, *image_shape), np.float32)
    expected = np.asarray(jax.jit(lambda images: model.apply(variables, images, train=False).logits)(images))
    for batch in (1, 37):
        np.testing.assert_allclose(run(data, images[:batch]), expected[:batch], rtol=0, atol=1e-4 * np.ptp(expected))


FAST = ("lenet", "resnet_s1")


@pytest.mark.parametrize("name", slow_unless(distinct((*FAST, *MODELS), CLASSES, 4), FAST))
def test_every_network_gives_the_same_logits(name):
    """Of every name in `MODELS`, but deep networks are cut short; those that are then the same are written once."""
    shape = (9, 8, 3) if name in FAST else (16, 16, 3)
    model = as_model(shallow(name, CLASSES, 4), CLASSES, f"{name}, cut short")
    variables = random_variables(model, shape)
    check_written(model, variables, shape, to_onnx(model, variables, shape))


LOWERINGS = (("native",), ("shifted",), ("patches", "bfloat16"))


@pytest.mark.parametrize("name", slow_unless(("lenet", "mobilenet_v2_s", "pyramidnet_11_24"), ("lenet",)))
def test_the_file_is_the_same_for_every_lowering(name):
    models = [make_model(name, CLASSES, 4, *options) for options in LOWERINGS]
    variables = random_variables(models[0], (9, 8, 3))
    first, *others = (to_onnx(model, variables, (9, 8, 3)) for model in models)
    assert all(data == first for data in others)


@pytest.mark.parametrize("name", MODELS)
def test_every_lowering_of_a_network_is_written_as_the_same_native_network(name):
    """The file depends on nothing else."""
    models = [make_model(name, CLASSES, 4, *options) for options in LOWERINGS]
    assert len({(model.architecture, model.num_classes, model.description) for model in models}) == 1
    assert models[0].architecture is not None


def tiny(apply):
    """A model of other making, whose logits are `apply(images)`."""

    def run(variables, images, *, train, edits=None):
        return ModelOutput(apply(images), {}, variables)

    return Model(lambda key, shape: {}, run, CLASSES, "tiny width 1")


def head(x):
    """Means and a constant matrix."""
    return jnp.mean(x, (1, 2)) @ np.random.default_rng(0).standard_normal((x.shape[-1], CLASSES)).astype(np.float32)


def patches(x):
    parts = [x[:, :4], x[:, 4:8]]
    return head(
        jnp.concatenate([parts[0] * parts[1], jnp.broadcast_to(jnp.arange(3.0) + 1, (1, 4, 8, 3)) * parts[0]], axis=3)
    )


def shifted_pool(x):
    """Maxima of neighbours, of which the first and the last pixel are left out: no max-pool from the edge."""
    return head(jnp.maximum(lax.slice_in_dim(x, 1, 7, 2, 1), lax.slice_in_dim(x, 2, 8, 2, 1)))


OTHERS = {
    "repeated numbers": patches,
    "no pool": shifted_pool,
    "cropped": lambda x: head(lax.pad(x, 0.5, ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 1, 0)))),
    "transposed": lambda x: head(jnp.transpose(jnp.transpose(x, (0, 3, 1, 2)) * 2, (0, 2, 3, 1)) + x),
    "flattened": lambda x: (
        x[:, 1:3, 5:].reshape(-1, 18) @ np.linspace(-1, 1, 90, dtype=np.float32).reshape(18, CLASSES)
    ),
    "picked": lambda x: head(x[:, 3:5] + x[:, None, 2]),
    "activations": lambda x: head(
        jax.nn.gelu(x - 0.5) + jax.nn.silu(x) + jnp.tanh(x) + jax.nn.leaky_relu(x - 0.5) + x**3
    ),
    "chosen": lambda x: head(jnp.where(x > 0.5, jnp.clip(x, 0.6, 0.7), jnp.abs(-x))),
    "clamped": lambda x: head(lax.clamp(np.float32(0.2), x, np.float32(0.7))),
    "averages": lambda x: jax.nn.log_softmax(head(x), axis=1),
    "the sum of constants": lambda x: head(x) + jnp.sum(jnp.broadcast_to(jnp.arange(5.0)[None], (3, 5)), 0)[None],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_operations_beside_those_of_our_networks(kind):
    model = tiny(OTHERS[kind])
    check_written(model, {}, (8, 8, 3), to_onnx(model, {}, (8, 8, 3)))


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda x: head(jnp.sort(x, axis=1)), "cannot be written as ONNX: JAX's sort has no translation$"),
        (lambda x: lax.fori_loop(0, 3, lambda i, y: y + 1, head(x)), "JAX's (scan|while) has no translation"),
        (lambda x: head(lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)))), "a padding of an unusual kind"),
        (lambda x: head(jnp.einsum("nhwc,nhwd->nhcd", x, x)), "a product of an unusual kind"),
    ],
)
def test_what_cannot_be_written_is_one_line(apply, message):
    with pytest.raises(InputError, match=f"^tiny width 1: .*{message}"):
        to_onnx(tiny(apply), {}, (8, 8, 3))


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def test_normalisation_is_inside():
    shape = (8, 8, 3)
    plain = make_model("lenet", CLASSES, lowering="shifted")
    variables = random_variables(plain, shape)
    images = np.random.default_rng(1).random((3, *shape), np.float32)
    model = normalised(plain, MEAN, STD)
    expected = run(to_onnx(plain, variables, shape), ((images - MEAN) / STD).astype(np.float32))
    np.testing.assert_allclose(run(to_onnx(model, variables, shape), images), expected, atol=1e-5)


def test_two_networks_that_abm_combines():
    shape, names = (8, 8, 1), ("lenet", "vbd_4_4p")
    model, shifted = (
        defended_model(*(make_model(name, CLASSES, lowering=lowering) for name in names))
        for lowering in ("native", "shifted")
    )
    variables = {**random_variables(model, shape), "gamma": np.float32(0.8), "delta": np.float32(2.5)}
    data = to_onnx(model, variables, shape)
    check_written(model, variables, shape, data)
    assert to_onnx(shifted, variables, shape) == data


def test_a_file_is_plain_and_names_its_ends(tmp_path):
    """Without a transposition at every convolution, and read back as a black box."""
    shape = (8, 8, 1)
    model = make_model("resnet_s1", CLASSES, 4, "native")
    variables = random_variables(model, shape)
    data = to_onnx(model, variables, shape)
    made = onnx.load_from_string(data)
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["images", "logits"]
    sides = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in made.graph.input
    ]
    assert sides == [["batch", 1, 8, 8]]
    kinds = {node.op_type for node in made.graph.node}
    assert (
        {"Conv", "Relu", "MatMul"} <= kinds <= {"Conv", "Relu", "MatMul", "Mul", "Add", "ReduceSum", "Div", "Identity"}
    )
    (tmp_path / "network.onnx").write_bytes(data)
    images = np.random.default_rng(1).random((3, *shape), np.float32)
    np.testing.assert_allclose(read(tmp_path / "network.onnx", CLASSES, shape)(images), run(data, images), atol=1e-6)


def test_slices_become_a_max_pool():
    model = make_model("vbd_4_4p", CLASSES, lowering="native")
    made = onnx.load_from_string(to_onnx(model, random_variables(model, (8, 8, 1)), (8, 8, 1)))
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count("MaxPool") == 2 and "Slice" not in kinds


def test_a_3x3_pool_becomes_a_max_pool():
    model = tiny(lambda x: head(max_pool_3x3(x - 0.5, (1, 2))))
    data = to_onnx(model, {}, (8, 7, 3))
    check_written(model, {}, (8, 7, 3), data)
    kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert kinds.count("MaxPool") == 2 and "Slice" not in kinds
