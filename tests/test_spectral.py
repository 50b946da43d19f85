"""Spectral merges against NumPy's SVD and against fusion_bench 0.2.33."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax import mesh
from collab_jax.merge import spectral
from collab_jax.merge.memory import merge
from collab_jax.merge.stack import chain, where
from collab_jax.merge.weigh import mean, scale

GOLDEN = np.load(Path(__file__).parent / "golden" / "spectral.npz")
NAMES = ("wide", "long", "bias")
WEIGHTS = (0.7, 1.3, 0.4)
ONES = (1.0, 1.0, 1.0)  # floats, so that the compiled programs are shared


def golden(method):
    return {name: GOLDEN[f"{method}/{name}"] for name in NAMES}


DELTAS = [golden(f"delta/{n}") for n in range(3)]


def naive_tsv_m(taus, orthogonal=True):
    k = min(taus[0].shape) // len(taus)
    found = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = np.concatenate([u[:, :k] for u, _, _ in found], 1)
    s = np.concatenate([s[:k] for _, s, _ in found])
    vt = np.concatenate([vt[:k] for _, _, vt in found])
    if orthogonal:
        u, vt = orthonormal(u), orthonormal(vt)
    return (u * s) @ vt


def orthonormal(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def naive_iso_c(taus, size=np.mean):
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    return size(s) * u @ vt


def naive_iso_cts(taus, common=0.8):
    k, count = min(taus[0].shape), len(taus)
    own = round((k - int(k * common)) / count)
    kept = k - own * count
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vts = [u[:, :kept]], [s[:kept]], [vt[:kept]]
    for tau in taus:
        rest = tau - us[0] @ us[0].T @ tau
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        us, ss, vts = [*us, u[:, :own]], [*ss, s[:own]], [*vts, vt[:own]]
    u, s, vt = np.concatenate(us, 1), np.concatenate(ss), np.concatenate(vts)
    return s.mean() * orthonormal(u) @ orthonormal(vt)


def naive_wudi(taus, ridge=0.0):
    grams = [tau.T @ tau / (tau**2).sum() for tau in taus]
    gram, whole = sum(grams), sum(taus)
    mu = ridge * np.trace(gram) / min(len(gram), len(taus) * len(taus[0]))
    right = sum(t @ g for t, g in zip(taus, grams, strict=True)) + mu * whole
    return right @ np.linalg.pinv(gram + mu * np.eye(len(gram)))


def wudi_loss(x, taus):
    return sum((((x - t) @ t.T) ** 2).sum() / (t**2).sum() for t in taus)


METHODS = {
    "tsv_m": (spectral.tsv_m(), naive_tsv_m),
    "iso_c": (spectral.iso_c(), naive_iso_c),
    "iso_cts": (spectral.iso_cts(), naive_iso_cts),
    "iso_cts_half": (spectral.iso_cts(0.5), lambda taus: naive_iso_cts(taus, 0.5)),
    "wudi": (spectral.wudi(), naive_wudi),
    "wudi_ridge": (spectral.wudi(0.1), lambda taus: naive_wudi(taus, 0.1)),
}


def naive(method, deltas, weights):
    """Leaf by leaf: matrices by the method, the rest by the mean."""
    found = {}
    for name in deltas[0]:
        taus = [w * np.float64(d[name]) for w, d in zip(weights, deltas, strict=True)]
        shape = taus[0].shape
        if len(shape) in (2, 4):
            rows = [tau.reshape(shape[0], -1) for tau in taus]
            found[name] = METHODS[method][1](rows).reshape(shape)
        else:
            found[name] = sum(taus) / len(taus)
    return found


def compare(found, expected, rtol):
    for name, leaf in expected.items():
        size = np.abs(leaf).max()
        np.testing.assert_allclose(
            found[name], leaf, rtol=0, atol=rtol * size, err_msg=name
        )


def run(method, deltas, weights, dtype):
    cast = [jax.tree.map(lambda x: jnp.asarray(x, dtype), delta) for delta in deltas]
    base = jax.tree.map(jnp.zeros_like, cast[0])
    return merge(METHODS[method][0], base, cast, weights)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "wudi_ridge"])
def test_against_numpy(method):
    with jax.enable_x64():
        found = run(method, DELTAS, WEIGHTS, jnp.float64)
        compare(found, naive(method, DELTAS, WEIGHTS), 1e-10)
    if method == "wudi_ridge":  # without it, Gram matrices square the condition
        found = run(method, DELTAS, WEIGHTS, jnp.float32)
        compare(found, naive(method, DELTAS, WEIGHTS), 1e-4)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "iso_cts_half"])
def test_against_fusion_bench(method):
    with jax.enable_x64():
        found = run(method, DELTAS, ONES, jnp.float64)
        compare(found, golden(method), 1e-10)
    if method != "iso_cts_half":
        compare(run(method, DELTAS, ONES, jnp.float32), golden(method), 1e-4)


def test_wudi_has_a_lower_loss_than_adam():
    with jax.enable_x64():
        exact = run("wudi", DELTAS, ONES, jnp.float64)
        early = run("wudi_ridge", DELTAS, ONES, jnp.float64)
    single = run("wudi", DELTAS, ONES, jnp.float32)
    for name in ("wide", "long"):
        taus = [delta[name] for delta in DELTAS]
        losses = [
            wudi_loss(np.float64(x), taus)
            for x in (exact[name], single[name], early[name], sum(taus))
        ]
        assert losses[0] <= losses[1] < losses[2] < losses[3]
        assert losses[1] < 1.001 * losses[0]
        assert losses[0] < wudi_loss(GOLDEN[f"wudi/{name}"], taus) < losses[3]
    np.testing.assert_allclose(exact["bias"], GOLDEN["wudi/bias"], atol=1e-15)


def test_controls():
    """Likely mistakes make another merge."""
    wrong = {
        "iso_c": lambda taus: naive_iso_c(taus, np.max),
        "tsv_m": lambda taus: naive_tsv_m(taus, orthogonal=False),
        "iso_cts": lambda taus: naive_iso_cts(taus, 1.0),
        "wudi": sum,
    }
    for method, mistake in wrong.items():
        for name in ("wide", "long"):
            right = golden(method)[name]
            gap = mistake([delta[name] for delta in DELTAS]) - right
            assert abs(gap).max() > 0.01 * abs(right).max(), (method, name)


def others(seed=0, count=3):
    """Shapes that are not a plain matrix, and matrices too small for three experts."""
    rng = np.random.default_rng(seed)
    shapes = {
        "row": (1, 6), "kernel": (4, 3, 2, 2), "block": (2, 3, 4), "long": (60, 6),
        "empty": (0, 4),
    }  # fmt: skip
    return [
        {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_other_shapes(method):
    deltas = others()
    with jax.enable_x64():
        found = run(method, deltas, WEIGHTS, jnp.float64)
    expected = naive(method, [
        {k: v for k, v in delta.items() if v.size} for delta in deltas
    ], WEIGHTS)  # fmt: skip
    if method == "tsv_m":  # not zero, but the mean, where no expert gets a direction
        for name in ("row",):  # of rank 1, for three experts
            expected[name] = np.mean(
                [w * d[name] for w, d in zip(WEIGHTS, deltas, strict=True)], 0
            )
    compare(found, expected, 1e-9)
    assert found["empty"].shape == (0, 4)


def test_single_experts():
    deltas = DELTAS[:1]
    for method in ("tsv_m", "wudi"):
        compare(run(method, deltas, (1.0,), jnp.float32), deltas[0], 1e-5)
    flat = run("iso_c", deltas, (1.0,), jnp.float32)
    compare(run("iso_cts", deltas, (1.0,), jnp.float32), flat, 1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_low_ranks_stay_low(method):
    """Deltas of LoRA: no direction appears that no expert has."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((3, 2, 40)), rng.standard_normal((3, 24, 2))
    deltas = [{"w": np.float32(b[n] @ a[n])} for n in range(3)]
    found = np.float64(run(method, deltas, ONES, jnp.float32)["w"])
    s = np.linalg.svd(found, compute_uv=False)
    assert s[6] < 1e-4 * s[5], s[:8] / s[0]
    rows = np.linalg.qr(np.concatenate(a).T)[0]
    assert abs(found - found @ rows @ rows.T).max() < 1e-4 * s[0]


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_sharding_changes_nothing(method):
    rng = np.random.default_rng(3)
    base = {"a": rng.standard_normal((16, 24))}
    deltas = [{"a": 0.1 * rng.standard_normal((16, 24))} for _ in range(3)]
    part = METHODS[method][0]
    devices = mesh.make_mesh(model=8)

    def gap(dtype, start, spec):
        """Norm of the difference over the norm of what was merged."""
        cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
        experts = [{"a": start["a"] + delta["a"]} for delta in deltas]
        trees = cast((start, experts))
        placed = jax.device_put(trees, NamedSharding(devices, spec))
        sharded = jax.jit(lambda b, e: merge(part, b, e, WEIGHTS))(*placed)["a"]
        plain = merge(part, *trees, WEIGHTS)["a"]
        return np.linalg.norm(sharded - plain) / np.linalg.norm(plain)

    with jax.enable_x64():  # of the delta alone
        zero = {"a": np.zeros((16, 24))}
        assert gap(jnp.float64, zero, PartitionSpec("model")) < 1e-12
    assert gap(jnp.float32, base, PartitionSpec(None, "model")) < 1e-6


def test_some_leaves_only():
    parts = chain(
        where("wide", spectral.flatten_spectrum),
        where("(?!wide).*", mean),
        scale(1.5),
    )
    cast = [jax.tree.map(jnp.float32, delta) for delta in DELTAS]
    base = jax.tree.map(jnp.zeros_like, cast[0])
    found = merge(parts, base, cast)
    compare(found, {
        name: 1.5 * (golden("iso_c")[name] if name == "wide"
                     else sum(delta[name] for delta in DELTAS) / 3)
        for name in NAMES
    }, 1e-4)  # fmt: skip


@pytest.mark.parametrize("method", ["iso_c", "wudi_ridge"])
def test_gradients(method):
    with jax.enable_x64():
        taus = [jnp.asarray(delta["wide"]) * 100 for delta in DELTAS]
        target = jnp.asarray(np.random.default_rng(5).standard_normal(taus[0].shape))

        def loss(weights):
            base = {"a": jnp.zeros_like(taus[0])}
            experts = [{"a": tau} for tau in taus]
            merged = merge(METHODS[method][0], base, experts, list(weights))
            return (merged["a"] * target).sum()

        weights = jnp.array(WEIGHTS)
        gradient, step = jax.jit(jax.grad(loss))(weights), 1e-6
        loss = jax.jit(loss)
        for i in range(3):
            up, down = (loss(weights.at[i].add(x)) for x in (step, -step))
            np.testing.assert_allclose(
                gradient[i], (up - down) / step / 2, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: spectral.iso_cts(1.2),
            r"common = 1.2 was given, a number in \[0, 1\]",
        ),
        (lambda: spectral.wudi(-1.0), "ridge = -1.0 was given, at least 0"),
        (lambda: spectral.wudi(float("nan")), "ridge = nan was given, at least 0"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
