"""The native products of rows of bfloat16 with weights of bfloat16 and of int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_native import in_digits, largest, made, near, needed, outlying

from collab_jax import native
from collab_jax.models import packed

SETS = {"bfloat16": ("bf16",), "int8": ("vnni", "bf16")}  # that have such products
PANELS = {"bfloat16": (jnp.uint16, []), "int8": (jnp.uint8, [jnp.ones(64)])}
DIGIT = 0.51 / 32630  # two digits are off by half a step, of the largest of a block
both = pytest.mark.parametrize("kind", SETS)


@needed
@both
@pytest.mark.parametrize("depth", [1, 64, 129, 576, 1535])
def test_rows_of_bfloat16_are_multiplied_as_they_are(depth, kind, instructions):
    kernel, matrix = made(kind, depth, 70)
    for rows in (1, 2, 5, 13, 61):
        x = jnp.asarray(outlying(0, rows, depth), jnp.bfloat16)
        wide = np.asarray(x, float)
        near(kernel.attend(x), wide @ matrix, wide, matrix, kind, DIGIT)
        assert kernel.project(x).dtype == jnp.bfloat16
    text = jax.jit(kernel.attend).lower(x).as_text()
    (call,) = [line for line in text.splitlines() if "collab_jax_products" in line]
    wide = f"tensor<61x{depth}xf32>" in call
    assert wide == (instructions not in SETS[kind])
    assert wide == (kind not in native.library().halves)


@needed
def test_one_digit_would_not_do(instructions):
    """The control: activations of 8 bits, which other engines multiply by int8."""
    if not in_digits("int8"):
        pytest.skip("this set multiplies no bytes")
    _, matrix = made("int8", 576, 70)
    x = np.asarray(jnp.asarray(outlying(0, 5, 576), jnp.bfloat16), float)
    unit = largest(x) / 127
    coarse = np.rint(x / unit) * unit @ matrix
    with pytest.raises(AssertionError):
        near(coarse, x @ matrix, x, matrix, "int8", DIGIT)


@needed
def test_rows_of_float32_are_not_rounded_to_bfloat16():
    kernel, matrix = made("bfloat16", 576, 70)
    x = outlying(0, 5, 576)
    exact = x.astype(float) @ matrix
    near(kernel.attend(jnp.asarray(x)), exact, x, matrix)
    with pytest.raises(AssertionError):
        near(kernel.attend(jnp.asarray(x, jnp.bfloat16)), exact, x, matrix)


@needed
@both
def test_rows_of_bfloat16_need_a_set_that_has_them(kind, instructions):
    half = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    held, scales = PANELS[kind]
    x, panels = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((2, 8, 32), held)
    if kind in native.library().halves:
        jax.block_until_ready(native.products(x, [panels], scales, [half]))
    else:
        with pytest.raises(Exception, match="x is bfloat16, which the instruction"):
            jax.block_until_ready(native.products(x, [panels], scales, [half]))


@both
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_short_numbers_as_they_are(kind, platform, monkeypatch):
    """Weights of both kinds are exact in bfloat16, and sums are float32."""
    monkeypatch.setenv("COLLAB_JAX_NATIVE", "0")  # packed as there
    kernel = packed.pack({"kernel": outlying(2, 24, 37)}, kind)["kernel"]
    for held, name in ((jnp.bfloat16, "bf16"), (jnp.float32, "f32")):
        x = jnp.ones((5, 24), held)
        traced = jax.jit(lambda x, kernel: kernel.project(x)).trace(x, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (dot,) = [line for line in text.splitlines() if "dot_general" in line]
        operands = f"(tensor<5x24x{name}>, tensor<24x37x{name}>)"
        assert f"{operands} -> tensor<5x37xf32>" in dot


@needed
@both
def test_members_and_derivatives(kind):
    """Stacked matrices, a shared one, and the slope that the plain form has."""
    stacked, matrices = made(kind, 3, 20, 37)
    one, matrix = made(kind, 20, 37, seed=5)
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
            near(y, own @ member, own, member, kind, DIGIT)
    slope = jax.grad(lambda x: kernel.attend(x).sum())(x[0])
    assert slope.dtype == jnp.bfloat16
    expected = np.broadcast_to(matrix.sum(1), (2, 20))
    np.testing.assert_allclose(np.asarray(slope, float), expected, rtol=2**-7)
