"""Polar factors and leading singular vectors against LAPACK in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.merge import polar
from collab_jax.merge.polar import null_tolerance

SHAPES = [(24, 24), (16, 48), (48, 16), (120, 12), (1, 7), (1, 1)]
FORMS = {
    "as the platform does": lambda x: polar.polar(x),
    "by products": lambda x: (
        polar.by_products(x, null_tolerance(x.shape, x.dtype))
        if x.shape[0] >= x.shape[1]
        else polar.by_products(x.T, null_tolerance(x.shape, x.dtype)).T
    ),
}
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def matrix(shape, condition, rank=None, seed=0):
    """Singular values fall geometrically from 1 to 1 / condition."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    u = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], k)))[0]
    s = np.geomspace(1, 1 / condition, k) if k > 1 else np.ones(1)
    s[k if rank is None else rank :] = 0
    return (u * s) @ v.T


def oracle(x, rtol):
    """Polar factor in float64, and condition number, null directions left out."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    kept = s > rtol * s[0]
    found, condition = (u * kept) @ vt, s[0] / s[kept][-1]
    if kept.all():  # the errors of an SVD in float64 are as large as those looked for
        found = np.asarray(x, np.longdouble) / s[0]
        found = found if x.shape[0] >= x.shape[1] else found.T
        for _ in range(12 + int(2.5 * np.log(condition))):
            found = 1.5 * found - 0.5 * found @ (found.T @ found)
        found = found if x.shape[0] >= x.shape[1] else found.T
    return np.asarray(found, np.float64), condition


def run(form, x, dtype):
    with jax.enable_x64(dtype == "float64"):
        found = jax.jit(FORMS[form])(jnp.asarray(x, dtype))
        assert found.dtype == dtype
        return np.asarray(found, np.float64)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("condition", [1, 30, 3000])
def test_polar(form, dtype, condition):
    for shape in SHAPES:
        x = 0.01 * matrix(shape, condition)
        x = np.asarray(x, dtype)
        expected, cond = oracle(x, null_tolerance(shape, dtype))
        found = run(form, x, dtype)
        bound = EPS[dtype] * (20 + 3 * cond)
        assert abs(found - expected).max() < bound, (shape, cond)
        tall = found if shape[0] >= shape[1] else found.T
        gap = tall.T @ tall - np.eye(min(shape))
        # orthonormal to rounding, however badly conditioned the matrix is
        assert abs(gap).max() < 50 * EPS[dtype], (shape, abs(gap).max() / EPS[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_an_unscaled_iteration_is_too_slow(form):
    """The control: fifteen plain Newton-Schulz steps do not reach small directions."""
    x = matrix((24, 24), 3000)
    plain = x / np.linalg.norm(x)
    for _ in range(15):
        plain = plain @ (3 * np.eye(24) - plain.T @ plain) / 2
    expected, cond = oracle(x, 0)
    assert abs(plain - expected).max() > 0.1
    assert abs(run(form, x, "float32") - expected).max() < EPS["float32"] * 3 * cond


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("form", FORMS)
def test_null_directions_stay_zero(form, dtype):
    for shape in [(24, 24), (16, 48), (120, 12)]:
        x = np.asarray(matrix(shape, 10, rank=5), dtype)  # rounded: not exactly rank 5
        expected, _ = oracle(x, null_tolerance(shape, dtype))
        found = run(form, x, dtype)
        assert np.linalg.matrix_rank(found, tol=1e-3) == 5
        assert abs(found - expected).max() < 200 * EPS[dtype], shape
        u, _, vt = np.linalg.svd(np.float64(x), full_matrices=False)
        assert abs(u @ vt - expected).max() > 0.1  # the control: an SVD fills them
    for shape in SHAPES:
        assert not run(form, np.zeros(shape), dtype).any()


@pytest.mark.parametrize("size", [1e-30, 1e12])
def test_neither_overflows(size):
    x = matrix((20, 10), 10)
    for form in FORMS:
        expected, _ = oracle(x, 0)
        found = run(form, np.float32(x * size), "float32")
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("rank", [None, 3])
def test_svd(dtype, rank):
    for shape in SHAPES:
        x = np.asarray(matrix(shape, 30, rank=rank), dtype)
        for r in {min(shape), max(1, min(shape) // 3)}:
            with jax.enable_x64(dtype == "float64"):
                found = jax.jit(polar.top_svd, static_argnums=1)(jnp.asarray(x), r)
                u, s, v = (np.asarray(a, np.float64) for a in found)
            u0, s0, vt0 = np.linalg.svd(np.float64(x), full_matrices=False)
            kept = s0[:r] > null_tolerance(shape, dtype) * s0[0]
            bound = 100 * EPS[dtype]
            np.testing.assert_allclose(s, s0[:r] * kept, atol=bound)
            best = (u0[:, :r] * s0[:r]) @ vt0[:r]
            # the gap behind the r-th value: 1 - 30 ** (-1 / k) of it, 0.13 at the least
            assert abs((u * s) @ v.T - best).max() < 20 * bound, (shape, r)
            for q in (u, v):
                assert abs(q.T @ q - np.diag(kept)).max() < 10 * bound, (shape, r)


def test_a_long_matrix_is_reduced():
    for condition in (1, 1e2, 1e6):
        x = np.float32(matrix((400, 20), condition))
        q, t = (np.float64(a) for a in polar.thin(jnp.asarray(x)))
        np.testing.assert_allclose(q @ t, x, atol=3e-6)
        if condition < 1e6:
            assert abs(q.T @ q - np.eye(20)).max() < 1e-5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: polar.polar(jnp.zeros(3)), r"shape \(3,\) was given, not a matrix"),
        (lambda: polar.top_svd(jnp.zeros((2, 3)), 3), "rank 3 of a matrix"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_an_svd_that_fails_is_taken_by_another_way(shape, monkeypatch):
    """LAPACK's divide and conquer gives NaN for some bases of real models."""
    x = jnp.asarray(matrix(shape, 10.0), jnp.float32)
    expected = polar.polar(x)
    plain, broke = polar._platform_svd, []

    def broken(x, algorithm=polar.SvdAlgorithm.DEFAULT):
        found = plain(x, algorithm)
        broke.append(algorithm == polar.SvdAlgorithm.DEFAULT)
        if algorithm == polar.SvdAlgorithm.DEFAULT:
            found = jax.tree.map(lambda y: jnp.full_like(y, jnp.nan), found)
        return found

    monkeypatch.setattr(polar, "_platform_svd", broken)
    found = jax.jit(lambda x: polar.by_svd(x, 1e-6))(x)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert any(broke)
    # NaN in, NaN out
    assert bool(jnp.isnan(polar.by_svd(x.at[0, 0].set(jnp.nan), 1e-6)).any())
