"""Writing behind the rows of a buffer, token by token and window by window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from collab_jax import mesh, slots
from collab_jax.collectives import collectives

S, H, K = 7, 4, 3
LENGTHS = [[0, 2, 5, 6], [7, 4, 9, 1]]
WAYS = {
    "tokens": slots._scattered,
    "heads": slots._by_heads,
    "windows": slots._in_windows,
}


def arrays(count, axis, batch=4):
    shape = (batch, S, H, K) if axis == 1 else (batch, H, S, K)
    buffer = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return buffer, -1.0 - np.arange(batch * count * H * K).reshape(batch, count, H, K)


def naive(buffer, values, length, axis):
    buffer = buffer.copy()
    for b, start in enumerate(length):
        for t, value in enumerate(values[b]):
            if start + t < S:
                where = (b, start + t) if axis == 1 else (b, slice(None), start + t)
                buffer[where] = value
    return buffer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 5, S])
@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_beyond_the_buffer_is_dropped(way, axis, count, length):
    """A full row, a row that lacks slots, and lengths beyond the buffer."""
    buffer, values = arrays(count, axis)
    values = values.astype(np.float32)
    found = jax.jit(WAYS[way], static_argnums=3)(
        buffer, values, jnp.array(length), axis
    )
    np.testing.assert_array_equal(found, naive(buffer, values, length, axis))


def test_a_window_that_only_clamps_is_wrong():
    """The control: `dynamic_update_slice` alone moves what does not fit."""
    buffer, values = arrays(2, 1)

    def row(buffer, values, start):
        return jax.lax.dynamic_update_slice_in_dim(buffer, values, start, 0)

    length = LENGTHS[0]
    found = jax.vmap(row)(buffer, values.astype(np.float32), jnp.array(length))
    assert (np.asarray(found) != naive(buffer, values, length, 1)).any()


def test_more_tokens_than_slots():
    buffer, values = arrays(S + 2, 1)
    found = slots.write(jnp.asarray(buffer), jnp.asarray(values), jnp.zeros(4, int))
    np.testing.assert_array_equal(found, naive(buffer, values, [0] * 4, 1))


INDICES = {
    ("tpu", 5): "tensor<4x4x5x1xi32>",  # a slot for each head
    ("tpu", slots.FEW + 1): "tensor<4x3xi32>",  # where a window starts
    ("cuda", 5): "tensor<4x5x1xi32>",
    ("cpu", 5): "tensor<4x5x1xi32>",
}


@pytest.mark.parametrize(("platform", "count"), INDICES)
def test_a_tpu_is_asked_for_updates_of_heads_or_of_rows(platform, count):
    buffer, values = jnp.zeros((4, H, 2 * count, K)), jnp.zeros((4, count, H, K))
    traced = jax.jit(slots.write, static_argnums=3).trace(
        buffer, values, jnp.zeros(4, jnp.int32), 2
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('"stablehlo.scatter"') == 1
    scatter = text[text.index('"stablehlo.scatter"') :].partition("->")[0]
    assert INDICES[platform, count] in scatter


@pytest.mark.parametrize("way", [slots._read_whole, slots._read_by_heads])
def test_slots_are_read_of_every_head(way):
    buffer, slot = arrays(1, 2)[0], np.array([[0, 6], [3, 3], [2, 1], [5, 0]])
    found = jax.jit(way)(buffer, slot)
    expected = [[buffer[b, :, s] for s in row] for b, row in enumerate(slot)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("platform", "sizes"), [("tpu", (1, 1, 1, K)), ("cuda", (1, H, 1, K))]
)
def test_a_tpu_reads_the_nodes_of_a_path_head_by_head(platform, sizes):
    arguments = jnp.zeros((4, H, S, K)), jnp.zeros(4, jnp.int32), jnp.ones((4, 2), int)
    traced = jax.jit(slots.compact, static_argnums=3).trace(*arguments, 2)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    gather = text[text.index('"stablehlo.gather"') :].partition("->")[0]
    assert f"slice_sizes = array<i64: {', '.join(map(str, sizes))}>" in gather


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_heads_on_a_mesh_stay_where_they_are(way):
    devices = mesh.make_mesh(data=4, model=2)
    buffer, values = map(jnp.asarray, arrays(3, 2))
    length = jnp.array(LENGTHS[0])

    def place(x, *axes):
        return jax.device_put(x, jax.NamedSharding(devices, PartitionSpec(*axes)))

    placed = (
        place(buffer, "data", "model"),
        place(values, "data", None, "model"),
        place(length, "data"),
    )
    compiled = jax.jit(WAYS[way], static_argnums=3).lower(*placed, 2).compile()
    # at most a word whether any window lies at the end, which all writes share
    shapes = [each.shapes for each in collectives(compiled.as_text())]
    assert shapes == ([((),)] if way == "windows" else [])
    found = compiled(*placed)
    assert found.sharding.spec[:2] == ("data", "model")
    np.testing.assert_array_equal(found, slots.write(buffer, values, length, 2))
