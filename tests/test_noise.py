"""The masks' random bits: uniform, independent, and decided by position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax import mesh
from collab_jax.merge import noise, pieces

COUNT = 1 << 18


def drawn(seed, count=COUNT):
    """Bits of one key, as NumPy."""
    return np.asarray(noise.bits(jax.random.key(seed), (count,)))


def chi_square(counts):
    """How far counts are from equal, in standard deviations of the statistic."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    free = counts.size - 1
    return (statistic - free) / np.sqrt(2 * free)


def weak(position, words):
    """A control: what a generator must not be, an unmixed counter."""
    return (position * np.uint32(0x9E3779B9) + words[0]) ^ words[1]


@pytest.mark.parametrize("seed", range(4))
def test_bits_are_uniform_at_every_place(seed):
    found = drawn(seed)
    for shift in range(0, 32, 8):
        assert abs(chi_square(np.bincount((found >> shift) & 255, minlength=256))) < 5
    share = [((found >> bit) & 1).mean() for bit in range(32)]
    assert max(abs(np.array(share) - 0.5)) < 5 * 0.5 / np.sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 576, 1024, 1 << 15])
def test_positions_are_independent(lag):
    found = drawn(7)
    pairs = (found[:-lag] >> 28) * 16 + (found[lag:] >> 28)
    assert abs(chi_square(np.bincount(pairs, minlength=256))) < 5
    bad = weak(np.arange(COUNT, dtype=np.uint32), np.uint32([5, 9]))
    pairs = (bad[:-lag] >> 28) * 16 + (bad[lag:] >> 28)
    assert chi_square(np.bincount(pairs, minlength=256)) > 50


def test_keys_are_independent():
    """Seeds in a row, folds in a row, and the experts of one leaf."""
    base = jax.random.key(3)
    keys = [jax.random.key(n) for n in range(6)]
    keys += [noise.fold_in(base, n) for n in range(6)]
    keys += [noise.fold_in(noise.fold_in(base, 1), n) for n in range(6)]
    rows = np.stack([np.asarray(noise.bits(key, (1 << 15,))) for key in keys])
    # centred to +-1: correlations of any two are within 5 standard deviations of 0
    signs = np.where(rows >> 31, 1.0, -1.0)
    gram = signs @ signs.T / signs.shape[1]
    off = gram[~np.eye(len(gram), dtype=bool)]
    assert abs(off).max() < 5 / np.sqrt(signs.shape[1])
    # one is not another one shifted; of 2 ** 30 pairs a quarter meets by chance
    for i, row in enumerate(rows):
        shared = [int(np.isin(row, other).sum()) for other in rows[i + 1 :]]
        assert max(shared, default=0) <= 5


def test_folds_of_many_names_do_not_meet():
    data = jax.vmap(lambda n: jax.random.key_data(noise.fold_in(jax.random.key(0), n)))(
        jnp.arange(1 << 16, dtype=jnp.uint32)
    )
    assert len(np.unique(np.asarray(data), axis=0)) == 1 << 16


def test_probabilities():
    key = jax.random.key(1)
    assert not noise.bernoulli(key, 0.0, (1000,)).any()
    assert noise.bernoulli(key, 1.0, (1000,)).all()
    for p in (0.01, 0.3, 0.9):
        mean = float(noise.bernoulli(key, p, (COUNT,)).mean())
        assert abs(mean - p) < 5 * np.sqrt(p * (1 - p) / COUNT)
    each = noise.bernoulli(key, jnp.array([0.0, 1.0]), (1000, 2))
    assert not each[:, 0].any()
    assert each[:, 1].all()


def test_any_part_of_a_leaf_draws_what_the_whole_draws():
    key = jax.random.key(5)
    whole = np.asarray(noise.bits(key, (24, 32)))
    flat = whole.reshape(-1)
    for start, size in ((0, 100), (100, 300), (400, 368)):
        with pieces.piecewise((), pieces.Place(start)):
            part = noise.bits(key, (size,))
        np.testing.assert_array_equal(part, flat[start : start + size])
    spec = NamedSharding(mesh.make_mesh(model=8), PartitionSpec("model"))
    sharded = jax.jit(lambda k: noise.bits(k, (24, 32)), out_shardings=spec)(key)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, whole)
