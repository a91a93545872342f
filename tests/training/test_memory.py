import jax
import jax.numpy as jnp
import pytest

from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models import make_model
from bdjax.training import ensemble, memory
from bdjax.training.member import Rows, TrainConfig, init_state, make_epoch, supervised

CONFIG = TrainConfig(epochs=1, batch_size=8)
SHAPE = (12, 12, 3)


def loss(logits, targets):
    return cross_entropy(logits, targets["labels"])


def abstract(model, count, rows=32):
    """The shapes of a training; nothing is computed."""
    shape = jax.ShapeDtypeStruct
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    states = jax.eval_shape(jax.vmap(lambda key: init_state(key, model, SHAPE, CONFIG)), keys)
    train = Rows(shape((count, rows), jnp.int32), {"labels": shape((count, rows), jnp.int32)})
    validation = Rows(shape((count, 0), jnp.int32), {"labels": shape((count, 0), jnp.int32)})
    return states, train, validation, shape((rows, *SHAPE), jnp.uint8)


@pytest.mark.parametrize(
    ("lowering", "layout", "dtype"),
    [
        pytest.param("native", "map", "float32", marks=pytest.mark.slow),
        pytest.param("patches", "vmap", "float32", marks=pytest.mark.slow),
        pytest.param("shifted", "map", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_near_the_compilers_analysis(lowering, layout, dtype):
    model = make_model("resnet10", 3, 8, lowering, dtype)
    states, train, validation, pool = abstract(model, 3)
    need = memory.estimate(supervised(model, loss), CONFIG, states, pool, train, validation)
    run = ensemble.compile_members(
        make_epoch(model, loss, CONFIG), layout, ensemble.spread_members(1), num_shared=1, donate=True
    )
    analysis = run.lower(states, train, validation, pool).compile().memory_analysis()
    real = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    assert 0.7 * real < need.total(3, 1 if layout == "map" else 3) < 2.5 * real


def test_bytes_are_counted_without_values():
    tree = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jnp.zeros(5, jnp.uint8), "key": jax.random.key(0)}
    assert memory.count_bytes(tree) == 24 + 5 + 8


def test_need_adds_up():
    need = memory.Need(shared=100, member=10, working=7)
    assert need.total(members=3, at_once=1) == 137
    assert need.total(members=3, at_once=3) == 151


@pytest.mark.parametrize(
    ("limit", "devices", "one_at_a_time", "expected"),
    [
        (None, 1, False, 7),  # unknown: all at once
        (1000, 1, False, 7),
        (100 + 3 * 17, 1, False, 3),
        (100 + 3 * 17 - 1, 1, False, 2),
        (100 + 3 * 10 + 7, 1, True, 3),
        (100 + 3 * 17, 2, False, 6),
        (100 + 17, 8, False, 7),
    ],
)
def test_as_many_members_as_fit(limit, devices, one_at_a_time, expected):
    need = memory.Need(shared=100, member=10, working=7)
    assert memory.largest_group(need, limit, 7, devices, one_at_a_time) == expected


def test_one_member_that_does_not_fit_is_an_error_with_advice():
    with pytest.raises(
        InputError, match=r"one member takes about 3 MiB of a device's 2 MiB usable: use a smaller --batch"
    ):
        memory.largest_group(memory.Need(2**20, 2**20, 2**20), 2**21, 7, 1, True)


def test_the_free_memory_of_a_cpu_is_known():
    free = memory.available()
    assert free is None or 2**20 < free < 2**50
