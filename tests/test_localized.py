"""One model per expert from a shared delta: against NumPy and fusion_bench 0.2.33."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax import mesh
from collab_jax.merge import localized, recipes
from collab_jax.merge.memory import merge
from collab_jax.merge.stack import chain
from collab_jax.merge.weigh import scale

GOLDEN = np.load(Path(__file__).parent / "golden" / "spectral.npz")
NAMES = ("wide", "long", "bias")
DELTAS = [{name: GOLDEN[f"delta/{n}/{name}"] for name in NAMES} for n in range(3)]
ZERO = {name: np.zeros_like(leaf) for name, leaf in DELTAS[0].items()}


def flat(tree):
    return np.concatenate([np.ravel(np.float64(tree[name])) for name in NAMES])


def cast(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def masks(found):
    """`[N, M]` bool."""
    return np.stack([
        flat({name: np.unpackbits(np.asarray(found.masks[name])[n], count=leaf.size)
              for name, leaf in ZERO.items()})
        for n in range(3)
    ]).astype(bool)  # fmt: skip


def naive_emr(taus):
    positive = sum(taus) > 0
    agree = [np.where(positive, tau > 0, tau < 0) for tau in taus]
    largest = np.max([abs(t) * a for t, a in zip(taus, agree, strict=True)], 0)
    shared = np.where(positive, largest, -largest)
    scales = [abs(t).sum() / abs(a * shared).sum()
              for t, a in zip(taus, agree, strict=True)]  # fmt: skip
    return shared, agree, scales


def test_emr():
    shared, agree, scales = naive_emr([flat(delta) for delta in DELTAS])
    with jax.enable_x64():
        found = localized.emr(cast(ZERO, jnp.float64), cast(DELTAS, jnp.float64))
        np.testing.assert_array_equal(flat(found.shared), shared)
        np.testing.assert_array_equal(masks(found), agree)
        np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
        for name in NAMES:  # the elected delta and the masks of fusion_bench
            np.testing.assert_array_equal(found.shared[name], GOLDEN[f"emr/{name}"])
        theirs = [flat({name: GOLDEN[f"emr_mask/{name}"][n] for name in NAMES})
                  for n in range(3)]  # fmt: skip
        np.testing.assert_array_equal(masks(found), np.stack(theirs) == 1)
        # the control: sums of means of tensors are other scales
        assert (abs(found.scales / GOLDEN["emr_scales"] - 1) > 0.01).all()
        for n in range(3):
            expected = scales[n] * agree[n] * shared
            np.testing.assert_allclose(flat(found.materialise(n)), expected, rtol=1e-6)


def test_emr_in_single_precision():
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(leaf.shape) for name, leaf in ZERO.items()}
    experts = [{name: base[name] + d[name] for name in NAMES} for d in DELTAS]
    found = localized.emr(cast(base), cast(experts))
    shared, agree, scales = naive_emr([
        flat({name: np.float32(e[name]) - np.float32(base[name]) for name in NAMES})
        for e in experts
    ])  # fmt: skip
    np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    take = jax.jit(lambda model, n: model.materialise(n))
    for n in range(3):
        expected = flat(cast(base)) + scales[n] * agree[n] * shared
        np.testing.assert_allclose(flat(take(found, n)), expected, atol=1e-6)
    assert take._cache_size() == 1  # one program for all experts


def test_one_expert_is_itself():
    found = localized.emr(cast(ZERO), cast(DELTAS[:1]))
    np.testing.assert_allclose(flat(found.materialise(0)), flat(DELTAS[0]), rtol=1e-6)
    same = localized.emr(cast(ZERO), cast([ZERO, ZERO]))
    assert not flat(same.materialise(1)).any()


def test_tall_masks():
    for_tau = chain(scale(0.3))
    with jax.enable_x64():
        wide = cast(ZERO, jnp.float64), cast(DELTAS, jnp.float64)
        found = localized.tall_masks(*wide, for_tau, 0.4)
        models = [flat(found.materialise(n)) for n in range(3)]
    taus = np.stack([flat(delta) for delta in DELTAS])
    tau = 0.3 * taus.sum(0)
    expected = abs(taus) >= 0.4 * abs(tau - taus)
    np.testing.assert_array_equal(masks(found), expected)
    # fusion_bench asks for more, not for as much: that is another answer at zeros
    differ = expected != GOLDEN["tall"]
    assert (taus[differ] == 0).all()
    assert (np.broadcast_to(tau, taus.shape)[differ] == 0).all()
    # the control: the pretrained weights in place of zero (its class, not its function)
    base = np.random.default_rng(1).standard_normal(len(tau))
    wrong = abs(base - taus) >= 0.4 * abs(tau - taus)
    assert (wrong != expected).mean() > 0.1
    for n in range(3):
        np.testing.assert_allclose(models[n], expected[n] * tau, rtol=1e-12)
    each = localized.tall_masks(cast(ZERO), cast(DELTAS), for_tau, [0.2, 0.4, 0.6])
    shares = masks(each).mean(1)
    assert shares[0] > masks(found)[0].mean() > 0
    assert shares[2] < masks(found)[2].mean()


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_consensus(k):
    taus = np.stack([flat(delta) for delta in DELTAS])
    weights = np.array([0.7, 1.3, 0.4])
    tau = weights @ taus
    kept = (abs(taus) >= 0.6 * abs(tau - taus)).sum(0) >= k
    found = merge(localized.consensus(k, 0.6, 0.5), cast(ZERO), cast(DELTAS), weights)
    np.testing.assert_allclose(flat(found), 0.5 * kept * tau, atol=1e-8)
    assert kept.any() == (k < 4)
    if k == 2:
        assert kept.mean() < 0.9


def test_consensus_over_another_merge():
    """The masks look at the deltas before it, and at what it made of them."""
    ties = recipes.ties(0.5)
    whole = flat(merge(ties, cast(ZERO), cast(DELTAS)))
    found = flat(merge(localized.keep_consensus(ties, 2), cast(ZERO), cast(DELTAS)))
    taus = np.stack([np.float32(flat(delta)) for delta in DELTAS])
    kept = (abs(taus) >= np.float32(0.4) * abs(np.float32(whole) - taus)).sum(0) >= 2
    np.testing.assert_allclose(found, kept * whole, atol=1e-8)
    assert 0 < (found != whole).mean() < 0.5


def test_types_integers_and_bytes():
    step = {"step": jnp.array(7)}
    base = cast(ZERO, jnp.bfloat16)
    experts = cast(DELTAS, jnp.bfloat16)
    size = sum(leaf.size for leaf in ZERO.values())
    for make in (localized.emr, localized.tall_masks):
        found = make(base | step, [e | step for e in experts])
        model = found.materialise(1)
        dtypes = [jax.tree.map(lambda x: x.dtype, t) for t in (model, base | step)]
        assert dtypes[0] == dtypes[1]
        assert int(model["step"]) == 7
        told = found.bytes()
        assert told["shared"] == 2 * size
        assert told["masks"] == 3 * sum(-(-x.size // 8) for x in ZERO.values())
        assert told["apart"] == 3 * told["base"] == 3 * (2 * size + 4)


def test_sharding_and_jit_change_nothing():
    rng = np.random.default_rng(0)
    base = {"a": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)}
    experts = [jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(
        np.float32), base) for _ in range(3)]  # fmt: skip
    rows = NamedSharding(mesh.make_mesh(model=8), PartitionSpec("model"))
    placed = jax.device_put((base, experts), rows)
    for make in (localized.emr, lambda b, e: localized.tall_masks(b, e, scale(0.3))):
        plain = make(base, experts)
        for found in (make(*placed), jax.jit(make)(*placed)):
            np.testing.assert_array_equal(found.masks["a"], plain.masks["a"])
            np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-6)
            np.testing.assert_allclose(
                found.materialise(2)["a"], plain.materialise(2)["a"], atol=1e-6
            )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saved_and_loaded(tmp_path, dtype):
    step = {"step": jnp.array(7)}
    base = cast(ZERO, dtype) | step
    found = localized.emr(base, [cast(delta, dtype) | step for delta in DELTAS])
    path = tmp_path / "experts.safetensors"
    localized.save(path, found)
    again = localized.load(path, base)
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(again), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    told = found.bytes()
    assert path.stat().st_size < told["shared"] + told["masks"] + 1200
    with pytest.raises(
        ValueError, match=r"shared/bias in .* has the shape \(7,\), the"
    ):
        localized.load(path, base | {"bias": jnp.zeros(8, dtype)})
    with pytest.raises(ValueError, match="tensor shared/more is missing"):
        localized.load(path, base | {"more": jnp.zeros(8, dtype)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it is cut off"):
        localized.load(path, base)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda b, e: localized.emr(b, []), "no expert was given"),
        (
            lambda b, e: localized.emr(b, [e[0], {**e[1], "bias": np.zeros(8)}]),
            r"expert 1 has \(8,\) at bias, the base has \(7,\)",
        ),
        (
            lambda b, e: localized.tall_masks(b, e, None, [0.4]),
            "1 thresholds for 3 experts",
        ),
        (lambda b, e: localized.consensus(-1), "k = -1 was given"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(ZERO, DELTAS)
