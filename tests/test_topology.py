"""Trees of ranks against every tree that there is."""

import itertools

import numpy as np
import pytest

from collab_jax.cooperate.efficient.topology import check_paths, grow

SHARES = [[0.5, 0.3, 0.0], [0.45, 0.2, 0.25], [0.9, 0.05, 0.0]]


def value(paths):
    """Expected tokens of the draft that stay."""
    return sum(np.prod([SHARES[i][r] for i, r in enumerate(path)]) for path in paths)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_measured_shares_grow_the_best_tree(nodes):
    every = [p for d in (1, 2, 3) for p in itertools.product(range(3), repeat=d)]
    likely = [p for p in every if value([p]) > 0.04]
    trees = (
        set(tree)
        for tree in itertools.combinations(likely, nodes)
        if all(path[:-1] in tree or len(path) == 1 for path in tree)
    )
    found = grow(nodes, np.array(SHARES))
    assert len(found) == nodes
    assert check_paths(found)[0][0] == -1
    assert value(found) == pytest.approx(max(value(tree) for tree in trees))


def test_a_tree_ends_with_its_heads():
    """And holds no guess that was never right."""
    found = grow(1000, SHARES)
    assert len(found) == 2 + 2 * 3 + 2 * 3 * 2
    assert max(map(len, found)) == 3
    assert value(found) == pytest.approx(0.8 + 0.8 * 0.9 + 0.8 * 0.9 * 0.95)


@pytest.mark.parametrize("shares", [[[1.2, 0.1]], [[-0.1]], [[0.0], [0.5]], []])
def test_what_are_no_shares_is_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        grow(3, shares)
