"""A merge as an optax transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import tree
from collab_jax.merge import recipes
from collab_jax.merge.aggregate import as_optax
from collab_jax.merge.memory import merge
from collab_jax.merge.stack import chain

CLIENTS = 3
TIES = recipes.ties(0.5, 0.8)
DARE = recipes.dare(0.5)


@pytest.fixture(scope="module")
def updates():
    rng = np.random.default_rng(0)
    shapes = {"a": (6,), "b": {"c": (4, 3)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal((CLIENTS, *shape)), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_a_plain_sum_with_equal_weights_is_fedavg():
    """Clients descend their own quadratics; the server averages their steps."""
    targets = jnp.array([[1.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
    params = {"x": jnp.array([3.0, -1.0])}
    server = optax.chain(
        as_optax(chain(), [1 / CLIENTS] * CLIENTS), optax.sgd(0.7, momentum=0.5)
    )

    def local(params, target):
        """Three steps of gradient descent; the pseudo-gradient they amount to."""
        own = params
        for _ in range(3):
            slope = jax.grad(lambda p: 0.5 * jnp.sum((p["x"] - target) ** 2))(own)
            own = jax.tree.map(lambda p, g: p - 0.1 * g, own, slope)
        return jax.tree.map(jnp.subtract, params, own)

    @jax.jit
    def turn(params, state):
        each = jax.vmap(local, (None, 0))(params, targets)
        updates, state = server.update(each, state, params)
        return optax.apply_updates(params, updates), state

    state, naive, momentum = server.init(params), np.array([3.0, -1.0]), np.zeros(2)
    for _ in range(4):
        params, state = turn(params, state)
        moves = []
        for target in np.asarray(targets, np.float64):
            own = naive.copy()
            for _ in range(3):
                own -= 0.1 * (own - target)
            moves.append(naive - own)
        momentum = 0.5 * momentum + sum(moves) / len(moves)
        naive = naive - 0.7 * momentum
    np.testing.assert_allclose(params["x"], naive, atol=1e-6)
    assert int(state[0].step) == 4
    # the control: a sum, which is what weights of 1 are, goes elsewhere
    summed, _ = as_optax(chain()).update({"x": targets}, state[0])
    assert abs(np.asarray(summed["x"]) - np.asarray(targets).mean(0)).max() > 1


@pytest.mark.parametrize("jitted", [False, True])
def test_it_is_the_merge_of_the_same_trees(updates, jitted):
    rows, weights = tree.unstack(updates), [0.5, 0.3, 0.9]
    expected = merge(TIES, None, rows, weights)
    aggregate = as_optax(TIES, weights)
    update = jax.jit(aggregate.update) if jitted else aggregate.update
    found, _ = update(updates, aggregate.init(rows[0]))
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours == 0, theirs == 0)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_random_parts_draw_anew_every_step_and_the_same_for_a_key(updates):
    def run(key):
        aggregate = as_optax(DARE, key=key)
        update, state, masks = jax.jit(aggregate.update), aggregate.init(None), []
        for _ in range(2):
            merged, state = update(updates, state)
            masks.append(np.asarray(merged["b"]["c"]))
        return masks

    first, second = run(jax.random.key(1))
    assert (first != second).any()
    again, other = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(second, again[1])
    assert (first != other[0]).any()


def test_what_optax_masks_stays_out():
    both = {"a": jnp.ones((CLIENTS, 2)), "b": None}
    merged, _ = as_optax(chain()).update(both, as_optax(chain()).init(None))
    assert merged["b"] is None
    assert merged["a"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))},
        {"a": jnp.zeros(())},
        {},
    ],
)
def test_leading_axes_have_to_agree(bad):
    aggregate = as_optax(chain())
    with pytest.raises(ValueError, match="leading axis of the same size"):
        aggregate.update(bad, aggregate.init(None))
