"""The native products of rows of bfloat16 with weights of bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_native import made, near, needed, outlying

from collab_jax import native


@needed
@pytest.mark.parametrize("depth", [1, 64, 129, 576, 1535])
def test_rows_of_bfloat16_are_multiplied_as_they_are(depth, instructions):
    kernel, matrix = made("bfloat16", depth, 70)
    for rows in (1, 2, 5, 13, 61):
        x = jnp.asarray(outlying(0, rows, depth), jnp.bfloat16)
        exact = np.asarray(x, float) @ matrix
        near(kernel.attend(x), exact, np.asarray(x, float), matrix)
        assert kernel.project(x).dtype == jnp.bfloat16
    text = jax.jit(kernel.attend).lower(x).as_text()
    (call,) = [line for line in text.splitlines() if "collab_jax_products" in line]
    wide = f"tensor<61x{depth}xf32>" in call
    assert wide == (instructions != "bf16") == (not native.library().halves)


@needed
def test_rows_of_float32_are_not_rounded_to_bfloat16():
    kernel, matrix = made("bfloat16", 576, 70)
    x = outlying(0, 5, 576)
    exact = x.astype(float) @ matrix
    near(kernel.attend(jnp.asarray(x)), exact, x, matrix)
    with pytest.raises(AssertionError):
        near(kernel.attend(jnp.asarray(x, jnp.bfloat16)), exact, x, matrix)


@needed
def test_rows_of_bfloat16_need_a_set_that_has_them(instructions):
    half = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    x, panels = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((2, 8, 32), jnp.uint16)
    if native.library().halves:
        jax.block_until_ready(native.products(x, [panels], [], [half]))
    else:
        with pytest.raises(Exception, match="x is bfloat16, and the panels or the"):
            jax.block_until_ready(native.products(x, [panels], [], [half]))


@needed
def test_members_and_derivatives():
    """Stacked matrices, a shared one, and the slope that the plain form has."""
    stacked, matrices = made("bfloat16", 3, 20, 37)
    one, matrix = made("bfloat16", 20, 37, seed=5)
    x = jnp.asarray(outlying(1, 6, 20).reshape(3, 2, 20), jnp.bfloat16)
    wide = np.asarray(x, float)

    def product(x, kernel):
        return kernel.attend(x)

    for axes, rows, kernel, given, weights in (
        ((0, 0), x, stacked, wide, matrices),
        ((None, 0), x[0], stacked, wide[[0, 0, 0]], matrices),
        ((0, None), x, one, wide, [matrix] * 3),
    ):
        found = jax.jit(jax.vmap(product, axes))(rows, kernel)
        for y, own, member in zip(found, given, weights, strict=True):
            near(y, own @ member, own, member)
    slope = jax.grad(lambda x: kernel.attend(x).sum())(x[0])
    assert slope.dtype == jnp.bfloat16
    expected = np.broadcast_to(matrix.sum(1), (2, 20))
    np.testing.assert_allclose(np.asarray(slope, float), expected, rtol=2**-7)
