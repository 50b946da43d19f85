"""The native products against sums in float64, in every instruction set there is here.

Where no compiler is found the tests of the library are skipped, those of the way
without it are not.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from collab_jax import native
from collab_jax.models import packed
from collab_jax.native import build

KINDS = "packed", "bfloat16", "int8"
HERE = build.SETS[1:]
needed = pytest.mark.skipif(not native.available(), reason=native.status())


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(kind, *shape, seed=0):
    """A packed matrix, and what it stands for in float64."""
    matrix = draw(seed, *shape)
    kernel = packed.pack({"kernel": jnp.asarray(matrix)}, kind)["kernel"]
    if kind == "int8":
        whole, scale = packed.quantise(matrix)
        return kernel, whole.astype(float) * scale[..., None, :].astype(float)
    if kind == "bfloat16":
        matrix = matrix.astype(ml_dtypes.bfloat16)
    return kernel, matrix.astype(float)


def in_digits(kind):
    """Whether activations become whole numbers."""
    best = build.chosen() == "best" and "vnni" in native.status()
    return kind == "int8" and (best or build.chosen() in ("vnni", "bf16"))


def largest(x):
    """For each number the largest of the 128 of its block."""
    found = np.empty_like(x)
    for k in range(0, x.shape[-1], 128):
        block = x[..., k : k + 128]
        found[..., k : k + 128] = np.abs(block).max(-1, keepdims=True)
    return found


def near(found, expected, x, matrix, kind="packed", digit=2.0**-22):
    """Whether found is expected up to the rounding of float32 sums.

    A sum of K products in any order is off by K 2^-24 of the sum of their sizes, at
    most; a scale and the rounding of the result add two such steps. Digits are off by
    so much of the largest of a block.
    """
    size = np.abs(x.astype(float)) @ np.abs(matrix)
    bound = (x.shape[-1] + 2) * 2.0**-24 * size
    if in_digits(kind):
        bound += digit * largest(x).astype(float) @ np.abs(matrix)
    assert found.shape == expected.shape
    gap = np.abs(np.asarray(found, float) - expected)
    assert np.all(gap <= bound)


# odd sizes; pieces of a sum, groups of rows, and what is left of them
SHAPES = [(rows, 33, 70) for rows in range(1, 18)]
SHAPES += [
    (3, 1, 1),
    (1, 7, 32),
    (2, 300, 33),
    (8, 513, 95),
    (13, 2100, 33),
    (61, 40, 65),
    (1, 0, 5),
    (301, 9, 40),
]


def drawn_shapes(count):
    draw = np.random.default_rng(7).integers
    return [
        (int(draw(1, 20)), int(draw(1, 90)), int(draw(1, 130))) for _ in range(count)
    ]


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(instructions, kind):
    shapes = SHAPES + drawn_shapes(20)
    xs = [draw(i, rows, depth) for i, (rows, depth, _) in enumerate(shapes)]
    pairs = [made(kind, *own, seed=i + 100) for i, (_, *own) in enumerate(shapes)]
    kernels = [kernel for kernel, _ in pairs]
    assert all(kernel.panels.shape[-1] == native.LANES for kernel in kernels)
    every = jax.jit(lambda xs, ks: [k.attend(x) for x, k in zip(xs, ks, strict=True)])
    found = every(xs, kernels)
    for x, y, (_, matrix) in zip(xs, found, pairs, strict=True):
        near(y, x.astype(float) @ matrix, x, matrix, kind)


@needed
def test_a_wrong_sum_is_noticed():
    x = draw(0, 4, 60)
    kernel, matrix = made("packed", 60, 40)
    found = np.array(kernel.attend(jnp.asarray(x)))
    found[2, 33] += 1e-3
    with pytest.raises(AssertionError):
        near(found, x.astype(float) @ matrix, x, matrix)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_several_matrices_in_one_call(kind):
    x = draw(0, 5, 30)
    pairs = [made(kind, 30, size, seed=size) for size in (64, 5, 33)]
    found = packed.project_all(jnp.asarray(x), [kernel for kernel, _ in pairs])
    for y, (_, matrix) in zip(found, pairs, strict=True):
        near(y, x.astype(float) @ matrix, x, matrix, kind)


def outlying(seed, rows, depth):
    """Numbers with a few large ones among them, as between the layers of a model."""
    x = draw(seed, rows, depth)
    x[:, :: max(depth // 3, 1)] *= 300
    return x


@needed
@pytest.mark.parametrize("depth", [64, 129, 576, 1535])
def test_activations_become_whole_numbers_of_24_bits(depth, instructions):
    x = outlying(0, 5, depth)
    kernel, matrix = made("int8", depth, 70)
    exact = x.astype(float) @ matrix
    near(kernel.attend(jnp.asarray(x)), exact, x, matrix, "int8")
    unit = largest(x) / 32639  # of 16 bits
    coarse = np.rint(x / unit) * unit.astype(float) @ matrix
    with pytest.raises(AssertionError):
        near(coarse, exact, x, matrix, "int8")


@needed
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_is_the_same_alone_and_among_others(dtype):
    """In whole numbers to the bit, and so for every width of a draft."""
    if not in_digits("int8"):
        pytest.skip("this processor has no products of bytes")
    kernel, _ = made("int8", 1029, 70)
    x = jnp.asarray(outlying(1, 150, 1029), dtype)
    every = np.asarray(kernel.attend(x))
    for rows in (1, 2, 3, 5, 6, 7, 8, 17, 64):
        found = np.asarray(kernel.attend(x[7 : 7 + rows]))
        np.testing.assert_array_equal(found, every[7 : 7 + rows])


@needed
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("int8", jnp.float32), ("int8", jnp.bfloat16), ("bfloat16", jnp.bfloat16)],
)
def test_what_is_not_finite_stays_in_its_row(kind, dtype, instructions):
    kernel, matrix = made(kind, 300, 40)
    x = outlying(0, 4, 300)
    x[0, 200], x[1, 3], x[2], x[3] = np.nan, np.inf, 0, 1e-38
    x = jnp.asarray(x, dtype)
    found = np.asarray(kernel.attend(x))
    assert np.isnan(found[0]).all()
    assert not np.isfinite(found[1]).any()
    assert (found[2] == 0).all()
    np.testing.assert_allclose(found[3], np.asarray(x[3], float) @ matrix, atol=1e-28)


@needed
def test_nothing_in_nothing_out():
    kernel, _ = made("packed", 4, 6)
    assert kernel.project(jnp.zeros((0, 4))).shape == (0, 6)
    none, _ = made("packed", 4, 0)
    assert none.project(jnp.zeros((3, 4))).shape == (3, 0)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_members(kind):
    stacked, matrices = made(kind, 3, 20, 37)
    one, matrix = made(kind, 20, 37, seed=5)
    x = draw(1, 3, 2, 20)

    def product(x, kernel):
        return kernel.attend(x)

    for axes, kernel, expected in (
        ((0, 0), stacked, np.matmul(x.astype(float), matrices)),
        ((None, 0), stacked, x[0].astype(float) @ matrices),
        ((0, None), one, x.astype(float) @ matrix),
    ):
        rows = x if axes[0] == 0 else x[0]
        found = jax.jit(jax.vmap(product, axes))(rows, kernel)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # one axis that both have, within one that neither or one of them has
    twice = jax.vmap(jax.vmap(product, (0, None)), (None, 0))
    found = twice(x, stacked)
    expected = np.einsum("mrk,nkc->nmrc", x.astype(float), matrices)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    deep = jax.vmap(jax.vmap(product, (0, 0)), (None, 0))
    more = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), stacked)
    expected = [np.matmul(x.astype(float), m) for m in (matrices, matrices[::-1])]
    np.testing.assert_allclose(deep(x, more), expected, rtol=1e-4, atol=1e-4)


@needed
def test_members_that_share_a_matrix_are_rows_of_one_product():
    kernel, _ = made("packed", 20, 37)
    program = jax.jit(jax.vmap(lambda x: kernel.attend(x)))
    text = program.lower(jnp.ones((3, 2, 20))).as_text()
    assert "tensor<3x2x20x32" not in text  # the panels were not repeated
    assert "tensor<1x2x20x32" in text


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_plain_form(kind):
    kernel, matrix = made(kind, 9, 40)
    x, weight = draw(1, 3, 9), draw(2, 3, 40)
    loss = lambda x: (kernel.attend(x) * weight).sum()  # noqa: E731
    near(jax.grad(loss)(jnp.asarray(x)), weight @ matrix.T, weight, matrix.T)
    many = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([x, 2 * x]))
    near(many[1], weight @ matrix.T, weight, matrix.T)
    value, tangent = jax.jvp(kernel.attend, (jnp.asarray(x),), (jnp.asarray(x),))
    np.testing.assert_allclose(value, tangent, rtol=1e-4, atol=1e-5)
    if kind == "packed":
        slope = jax.grad(lambda kernel: (kernel.attend(x) * weight).sum())(kernel)
        near(slope.unpack(), x.T.astype(float) @ weight, x.T, weight.astype(float))


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_neither_copies_nor_widens_the_panels(kind):
    kernel, matrix = made(kind, 256, 256)
    matrix = matrix / 16

    @jax.jit
    def power(x, kernel, count):
        def step(carry):
            i, x = carry
            return i + 1, kernel.project(x) / 16

        return jax.lax.while_loop(lambda c: c[0] < count, step, (0, x))[1]

    x = draw(1, 2, 256)
    compiled = power.lower(x, kernel, 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.panels.nbytes
    expected = x.astype(float) @ matrix @ matrix @ matrix
    np.testing.assert_allclose(power(x, kernel, 3), expected, rtol=1e-3, atol=1e-4)


@needed
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_reads_rows_of_a_table_where_they_lie(kind):
    matrix = jnp.asarray(draw(0, 256, 64))
    table = packed.pack({"embed": {"embedding": matrix}}, kind)["embed"]["embedding"]

    @jax.jit
    def walk(table, token):
        def step(_, carry):
            token, total = carry
            return (token * 5 + 1) % 256, total + table.lookup(token)

        return jax.lax.fori_loop(0, 9, step, (token, jnp.zeros((1, 64))))[1]

    compiled = walk.lower(table, jnp.array([3])).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.panels.nbytes / 2
    tokens = [3]
    for _ in range(8):
        tokens.append((tokens[-1] * 5 + 1) % 256)
    expected = np.asarray(table.unpack())[tokens].sum(0)
    found = walk(table, jnp.array([3]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@needed
def test_shard_map():
    """Every device multiplies its own rows, or by its own columns."""
    kernel, matrix = made("int8", 16, 256)
    x = draw(1, 8, 16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    rows = jax.shard_map(
        lambda x, kernel: kernel.attend(x),
        mesh=mesh,
        in_specs=(spread, whole),
        out_specs=spread,
    )
    near(jax.jit(rows)(x, kernel), x.astype(float) @ matrix, x, matrix, "int8")

    def own_columns(x, panels, scale):
        part = packed.Packed(panels, scale, 32, kernel.dtype, False)
        return part.attend(x)

    columns = jax.shard_map(
        own_columns,
        mesh=mesh,
        in_specs=(whole, spread, spread),
        out_specs=jax.sharding.PartitionSpec(None, "d"),
    )
    found = jax.jit(columns)(x, kernel.panels, kernel.scale)
    near(found, x.astype(float) @ matrix, x, matrix, "int8")


@needed
def test_scan_and_half_precision():
    kernel, matrix = made("bfloat16", 12, 12)
    xs = draw(1, 4, 2, 12)
    _, found = jax.lax.scan(lambda c, x: (c, kernel.attend(x)), 0, xs)
    np.testing.assert_allclose(found, xs.astype(float) @ matrix, rtol=1e-4, atol=1e-4)
    half = jnp.asarray(xs[0], jnp.bfloat16)
    assert kernel.project(half).dtype == jnp.bfloat16
    assert kernel.attend(half).dtype == jnp.float32
    expected = np.asarray(half, float) @ matrix
    np.testing.assert_allclose(kernel.attend(half), expected, rtol=1e-4, atol=1e-4)


@needed
def test_rows_and_matrices_over_eight_devices():
    """What lies on several devices is computed there, or gathered: it is right."""
    kernel, matrix = made("packed", 16, 256)
    x = draw(1, 8, 16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    product = jax.jit(lambda x, kernel: kernel.attend(x))
    for rows, panels in ((spread, whole), (whole, spread), (spread, spread)):
        found = product(jax.device_put(x, rows), jax.device_put(kernel, panels))
        near(found, x.astype(float) @ matrix, x, matrix)


def test_what_does_not_fit_is_an_error():
    x, panels = jnp.ones((2, 8)), jnp.ones((2, 8, native.LANES))
    wide = [jax.ShapeDtypeStruct((2, 64), jnp.float32)]
    if not native.available():
        with pytest.raises(RuntimeError, match="no native library"):
            native.products(x, [panels], [], wide)
        return
    wider = [jax.ShapeDtypeStruct((2, 65), jnp.float32)]
    for wrong in (
        lambda: native.products(x, [panels], [], wider),
        lambda: native.products(jnp.ones((2, 9)), [panels], [], wide),
        lambda: native.products(x.astype(jnp.bfloat16), [panels], [], wide),
        lambda: native.products(x, [panels.astype(jnp.bfloat16)], [], wide),
        lambda: native.products(x, [panels.astype(jnp.int8)], [], wide),
        lambda: native.products(x, [panels.astype(jnp.uint8)], [], wide),
        lambda: native.products(x, [panels], [jnp.ones(64)], wide),
    ):
        with pytest.raises(Exception, match="collab_jax: "):
            jax.block_until_ready(wrong())


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("COLLAB_JAX_NATIVE", "0")
    assert not native.available()
    assert native.status() == "off: COLLAB_JAX_NATIVE=0"
    for kind in KINDS[1:]:
        x = draw(1, 3, 20)
        kernel, matrix = made(kind, 20, 37)
        assert kernel.panels.shape == (1, 20, 37)
        near(kernel.attend(jnp.asarray(x)), x.astype(float) @ matrix, x, matrix)
    plain = {"kernel": jnp.ones((2, 3))}
    assert packed.pack(plain)["kernel"] is plain["kernel"]


def test_a_setting_that_means_nothing_is_an_error(monkeypatch):
    monkeypatch.setenv("COLLAB_JAX_NATIVE", "mmx")
    with pytest.raises(ValueError, match="COLLAB_JAX_NATIVE=mmx: 0, 1 or one of best"):
        native.available()
    monkeypatch.delenv("COLLAB_JAX_NATIVE")
    if not native.available():
        return
    for name in [name for name in HERE if name not in native.status()]:
        monkeypatch.setenv("COLLAB_JAX_NATIVE", name)
        with pytest.raises(ValueError, match=f"{name}: this processor does not have"):
            native.available()
