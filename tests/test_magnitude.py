"""The k largest magnitudes against sorting, whole and in pieces, ties and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.merge import magnitude, pieces

COUNT = 600
CASES = {
    "distinct": np.random.default_rng(0).standard_normal(COUNT),
    "tied": np.round(np.random.default_rng(1).standard_normal(COUNT), 1),
    "mostly zero": np.where(np.arange(COUNT) % 7, 0, np.arange(COUNT) - 300.0),
    "equal": np.ones(COUNT),
    "tiny and huge": np.random.default_rng(2).standard_normal(COUNT)
    * 10.0 ** np.random.default_rng(3).integers(-37, 38, COUNT),
}
KS = (1, 2, 299, COUNT - 1, COUNT)


def naive(x, k, ties):
    """By a stable sort."""
    order = np.argsort(-abs(x), kind="stable")
    if ties == "all":
        return abs(x) >= abs(x)[order[k - 1]]
    kept = np.zeros(len(x), bool)
    kept[order[:k]] = True
    return kept


found = jax.jit(magnitude.largest, static_argnums=2)


@pytest.mark.parametrize("ties", ["all", "first"])
@pytest.mark.parametrize("case", CASES)
def test_the_largest(case, ties):
    x = CASES[case].astype(np.float32)
    for k in KS:
        np.testing.assert_array_equal(
            found([x], [jnp.int32(k)], ties)[0], naive(x, k, ties), err_msg=str(k)
        )
    assert not found([x], [jnp.int32(0)], ties)[0].any()


@pytest.mark.parametrize("case", CASES)
def test_counting_bits_finds_the_same_threshold(case):
    """What accelerators run, here on CPU."""
    values = magnitude.pattern(jnp.float32(CASES[case]))
    by_bits = jax.jit(magnitude._by_bits)
    by_digits = jax.jit(magnitude._by_digits)
    for k in KS:
        one, two = by_bits(values, jnp.int32(k)), by_digits(values, jnp.int32(k))
        assert int(one.least) == int(two.least)
        assert int(one.tied) == int(two.tied)


@pytest.mark.parametrize("case", ["distinct", "tied", "tiny and huge"])
def test_float64(case):
    with jax.enable_x64(True):
        x = jnp.asarray(CASES[case] * (1 + 1e-12 * np.arange(COUNT)))
        assert x.dtype == jnp.float64
        for k in (1, 299):
            for ties in ("all", "first"):
                np.testing.assert_array_equal(
                    found([x], [jnp.int32(k)], ties)[0], naive(np.asarray(x), k, ties)
                )


def in_pieces(xs, ks, ties, size):
    """Runs `largest` as the streaming driver does, without its programs."""
    count, known = len(xs[0]), ()
    while True:
        columns, wanted, masks = [], None, []
        for start in range(0, count, size):
            try:
                with pieces.piecewise(known, pieces.Place(start)):
                    own = [x[start : start + size] for x in xs]
                    own = [jnp.pad(x, (0, size - len(x))) for x in own]
                    masks.append(magnitude.largest(own, ks, ties))
            except pieces.Wanted as asked:
                wanted = asked
                columns.append([np.asarray(x)[: count - start] for x in asked.summary])
        if wanted is None:
            joined = (np.concatenate(column) for column in zip(*masks, strict=True))
            return [mask[:count] for mask in joined]
        assert wanted.unit((count,)) == count
        operands = jax.tree.map(np.asarray, wanted.operands)
        found = [
            wanted.settle(np.concatenate(column), n, (count,), *operands)
            for n, column in enumerate(zip(*columns, strict=True))
        ]
        known = (*known, found)


@pytest.mark.parametrize("ties", ["all", "first"])
@pytest.mark.parametrize("size", [250, 300])
def test_pieces_agree_on_one_threshold(size, ties):
    xs = [np.float32(CASES[case]) for case in ("tied", "distinct", "equal")]
    for ks in ((1, 299, 299), (COUNT, 2, 65)):
        masks = in_pieces([jnp.asarray(x) for x in xs], ks, ties, size)
        for x, k, mask in zip(xs, ks, masks, strict=True):
            np.testing.assert_array_equal(mask, naive(x, k, ties))
    # the control: each piece for itself keeps other entries
    k = 100
    alone = [naive(xs[0][s : s + 300], k // 2, ties) for s in (0, 300)]
    assert (np.concatenate(alone) != naive(xs[0], k, ties)).any()


def test_several_ranks_of_one_array():
    """One selection does not undo another."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 1 << 20, 2000).astype(np.uint32)
        ks = [int(2000 * rng.uniform(0.2, 0.9)), int(2000 * rng.uniform(0.001, 0.15))]
        found = magnitude._select(values, [max(k, 1) for k in ks])
        ordered = np.sort(values)[::-1]
        for k, (least, _, last) in zip(ks, found, strict=True):
            assert least == ordered[max(k, 1) - 1]
            among = np.count_nonzero(ordered[: max(k, 1)] == least)
            assert last == np.flatnonzero(values == least)[among - 1]


def test_bad_input():
    with pytest.raises(ValueError, match="ties = 'last': 'all' or 'first'"):
        magnitude.largest([jnp.ones(3)], [1], "last")
