"""Attention in native code against sums in float64, in every instruction set here."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_attention import model

from collab_jax import decode, native, testing
from collab_jax.lm import language_model
from collab_jax.models import attention
from collab_jax.models.packed import pack
from collab_jax.models.transformer import transformer

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

# rows, tokens, key-value heads, queries a head, size, slots, cap
SHAPES = [
    (1, 1, 3, 3, 64, 300, None),
    (2, 5, 2, 4, 20, 130, 5.0),
    (3, 16, 1, 1, 7, 64, None),
    (1, 1, 1, 1, 1, 1, None),
    (2, 8, 2, 2, 128, 65, 30.0),
    (1, 3, 1, 7, 512, 40, None),
    (1, 70, 2, 2, 16, 200, None),
]
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def drawn(batch, tokens, heads, group, size, slots, dtype=np.float32, seed=0):
    """Queries, keys, values, a mask with holes, and within which slots it lies."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, tokens, heads * group, size)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, heads, slots, size)).astype(dtype)
    first, last = slots // 7, slots - slots // 9
    slot = np.arange(slots)
    mask = rng.random((batch, tokens, slots)) < 0.5
    mask &= (slot >= first) & (slot < last)
    mask[:, :, (first + last) // 2] = True
    return q, k, v, mask, (jnp.int32(first), jnp.int32(last))


def naive(q, k, v, mask, scale, cap):
    """Query by query in float64."""
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    batch, tokens, count, size = q.shape
    out = np.zeros((batch, tokens, count, size))
    for b in range(batch):
        for t in range(tokens):
            for n in range(count):
                h = n // (count // k.shape[1])
                scores = scale * k[b, h] @ q[b, t, n]
                if cap is not None:
                    scores = cap * np.tanh(scores / cap)
                scores = np.where(mask[b, t], scores, -np.inf)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, h] / weights.sum()
    return out.reshape(batch, tokens, -1)


@pytest.mark.parametrize("dtype", TYPES)
def test_attention_is_that_of_float64(instructions, dtype):
    read = jax.jit(attention.attend_natively, static_argnums=(5, 6))
    for number, (*shape, cap) in enumerate(SHAPES):
        q, k, v, mask, reach = drawn(*shape, TYPES[dtype], number)
        found = read(q, k, v, mask, reach, 0.4, cap)
        expected = naive(q, k, v, mask, 0.4, cap)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_mistakes_are_noticed():
    q, k, v, mask, reach = drawn(2, 5, 2, 4, 20, 130)
    found = attention.attend_natively(q, k, v, mask, reach, 0.4, None)
    whole = np.ones_like(mask)
    swapped = q.reshape(2, 5, 2, 4, 20).swapaxes(2, 3).reshape(q.shape)
    for wrong in (
        naive(q, k, v, whole, 0.4, None),
        naive(q, k, v, mask, 0.4, 3.0),
        naive(q, k, v, mask, 0.5, None),
        naive(swapped, k, v, mask, 0.4, None),
    ):
        assert abs(found - wrong).max() > 1e-2


def test_large_scores_and_what_is_not_finite():
    """Scores of any size; NaN comes through; slots outside of reach are not read."""
    q, k, v, mask, (first, last) = drawn(1, 2, 1, 2, 16, 150)
    found = attention.attend_natively(q, k, v, mask, (first, last), 300.0, None)
    np.testing.assert_allclose(found, naive(q, k, v, mask, 300.0, None), atol=2e-4)
    for leaf in (k, v):
        leaf[:, :, : int(first)] = leaf[:, :, int(last) :] = np.nan
    mask[:, :, int(last)] = True
    read = functools.partial(attention.attend_natively, q, k, v, mask)
    assert bool(jnp.isfinite(read((first, last), 0.4, None)).all())
    assert bool(jnp.isnan(read((first, last + 1), 0.4, None)).all())
    q = q.copy()
    q[0, 1, 0, 3] = np.nan
    found = attention.attend_natively(q, k, v, mask, (first, last), 0.4, None)
    assert bool(jnp.isnan(found[0, 1, :16]).all())
    assert bool(jnp.isfinite(found[0, 0]).all())


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, 0, None), (None, 0, None, 0)])
def test_vmap_over_members(axes):
    """What members share has no axis; of two axes one may be in each array."""
    parts = [drawn(2, 3, 2, 2, 12, 70, seed=n) for n in range(3)]
    reach = parts[0][4]
    given = [
        np.stack([part[i] for part in parts]) if axis == 0 else parts[0][i]
        for i, axis in enumerate(axes)
    ]

    def read(q, k, v, mask):
        return attention.attend_natively(q, k, v, mask, reach, 0.4, None)

    def member(n):
        return [x[n] if axis == 0 else x for x, axis in zip(given, axes, strict=True)]

    found = jax.jit(jax.vmap(read, axes))(*given)
    for n in range(3):
        expected = naive(*member(n), 0.4, None)
        np.testing.assert_allclose(found[n], expected, rtol=0, atol=2e-5)
    outer = tuple(0 if axis is None else None for axis in axes)
    if any(axis == 0 for axis in outer):
        more = [
            np.stack([x, x[::-1]]) if axis == 0 else x
            for x, axis in zip(given, outer, strict=True)
        ]
        both = jax.vmap(jax.vmap(read, axes), outer)(*more)
        np.testing.assert_array_equal(both[0], found)


def test_derivatives_are_those_of_the_plain_form():
    q, k, v, mask, reach = drawn(2, 3, 2, 2, 12, 70)

    def loss(read, q, k, v):
        return (read(q, k, v) ** 2).sum()

    plain = lambda *args: attention.attend(*args, mask, 0.4)[0]  # noqa: E731
    fast = lambda *args: attention.attend_natively(*args, mask, reach, 0.4, None)  # noqa: E731
    expected = jax.grad(loss, (1, 2, 3))(plain, q, k, v)
    found = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(fast, q, k, v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def calls(program, *args):
    """How often a program calls the native attention on a CPU."""
    return jax.jit(program).lower(*args).as_text().count("@collab_jax_attend_")


@pytest.mark.parametrize("window", [None, 6])
def test_a_model_with_packed_matrices(window):
    """It obeys the laws, writes the same text, and reads its cache in native code."""
    config, params = model()
    config = config.__class__(**{**vars(config), "windows": (window, None)})
    lm, small = language_model(transformer(config)), pack(params)
    testing.check_lm(lm, small, vocab=31, jit=True)
    prompt, length = decode.pad([[1, 2, 3], [4, 5, 6, 7, 8]])
    texts = [
        decode.compile(lambda _: decode.greedy(lm, 24))(
            None, own, prompt, length, jax.random.key(0)
        ).tokens
        for own in (params, small)
    ]
    np.testing.assert_array_equal(*texts)
    state = lm.init(small, 1, 64)
    one = jnp.ones((1, 1), jnp.int32)
    assert calls(lm.extend, small, state, one) == 1  # one function for both layers
    assert calls(lm.extend, params, state, one) == 0


def test_what_does_not_fit_is_an_error():
    q, k, v, mask, reach = drawn(1, 2, 2, 2, 8, 20)
    result = jax.ShapeDtypeStruct((1, 2, 32), jnp.float32)
    for wrong in (
        (q[:, :, :3], k, v, mask, reach),
        (q, k, v[:, :, :19], mask, reach),
        (q, k, v, mask[:, :1], reach),
        (q, k, v.astype(ml_dtypes.bfloat16), mask, reach),
        (q, k, v, mask.astype(np.int8), reach),
        (q[0], k, v, mask, reach),
    ):
        with pytest.raises(Exception, match="collab_jax: "):
            jax.block_until_ready(native.attend(*wrong, None, result))
