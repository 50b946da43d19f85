"""Diagnostics of a merge against NumPy and loops, with controls."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from collab_jax.io.layout import Checkpoint, Layout
from collab_jax.merge.inspect import diagnose
from collab_jax.merge.inspect.compare import WIDEST, choose, compare, rank_work
from collab_jax.merge.inspect.correspond import Matched, correspond
from collab_jax.merge.inspect.tally import row
from collab_jax.merge.inspect.verdict import verdict

TYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def naive(base, experts, cuts):
    """Every sum, entry by entry, in Python's floats."""
    deltas = [
        [float(e) - float(b) for e, b in zip(x.ravel(), base.ravel(), strict=True)]
        for x in experts
    ]
    start = [float(b) for b in base.ravel()]
    count = len(deltas)
    found = diagnose.zeros(count)._replace(size=len(start))
    for k, b in enumerate(start):
        v = [b, *(d[k] for d in deltas)]
        t = v[1:]
        for i, j in itertools.product(range(count + 1), repeat=2):
            found.gram[i, j] += v[i] * v[j]
        for i in range(count):
            found.changed[i] += t[i] != 0
            found.large[i] += abs(t[i]) > 0.005
            for j in range(count):
                tops = [t[n] != 0 and abs(t[n]) >= cuts[n] for n in (i, j)]
                found.top[i, j] += all(tops)
                if i != j and t[i] != 0 and t[j] != 0:
                    mass = abs(t[i]) + abs(t[j])
                    found.both[i, j] += 1
                    found.both_mass[i, j] += mass
                    if (t[i] > 0) != (t[j] > 0):
                        found.against[i, j] += 1
                        found.against_mass[i, j] += mass
        mass = sum(map(abs, t))
        if sum(x != 0 for x in t) > 1:
            found.active[0] += 1
            found.active[2] += mass
            if min(t) < 0 < max(t):
                found.active[1] += 1
                found.active[3] += mass
        found.mass[0] += mass
        found.mass[1] += abs(sum(t))
    return found


def models(count, shape, dtype, seed=0):
    """A base and experts, of which some entries did not move."""
    draw = np.random.default_rng(seed)
    base = draw.standard_normal(shape)
    moved = [
        draw.standard_normal(shape) * (draw.random(shape) < 0.7) * 0.01 * (n + 1)
        for n in range(count)
    ]
    return base.astype(dtype), [(base + m).astype(dtype) for m in moved]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("count", "shape"), [(2, (7, 30)), (3, (211,)), (4, (5, 3))])
def test_sums_are_those_of_loops(count, shape, dtype, monkeypatch):
    monkeypatch.setattr(diagnose, "BLOCK", 64)  # blocks that do not fit
    base, experts = models(count, shape, dtype)
    cuts = [diagnose.cut(base, x) for x in experts]
    found, wanted = diagnose.sums(base, experts, cuts), naive(base, experts, cuts)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        tolerance = 1e-12 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
    assert np.asarray(found.changed).max() < base.size  # some did not move
    assert np.asarray(found.against).sum() > 0


def test_one_expert_and_scalars():
    base, experts = models(1, (), np.float32)
    found = diagnose.statistics(diagnose.sums(base, experts, [0.0]))
    assert found.norm[0] == pytest.approx(abs(float(experts[0] - base)))
    assert math.isnan(found.conflict)
    empty = diagnose.sums(np.zeros((0, 3)), [np.zeros((0, 3))], [0.0])
    assert empty.size == 0


def test_statistics_are_those_of_numpy():
    base, experts = models(3, (40, 50), np.float64)
    deltas = [x - base for x in experts]
    cuts = [diagnose.cut(base, x) for x in experts]
    found = diagnose.statistics(diagnose.sums(base, experts, cuts))
    norms = [np.linalg.norm(d) for d in deltas]
    np.testing.assert_allclose(found.norm, norms)
    np.testing.assert_allclose(found.relative, norms / np.linalg.norm(base))
    flat = np.stack([d.ravel() for d in deltas])
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(found.cosine, unit @ unit.T, atol=1e-12)
    weights = np.stack([base.ravel(), *(x.ravel() for x in experts)])
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    np.testing.assert_allclose(found.weight_cosine, unit @ unit.T, atol=1e-12)
    signs = np.sign(flat)
    several = (signs != 0).sum(0) > 1
    both = (signs.min(0) < 0) & (signs.max(0) > 0)
    assert found.conflict == pytest.approx(both.sum() / several.sum())
    mass = np.abs(flat).sum(0)
    assert found.weighted == pytest.approx(mass[both].sum() / mass[several].sum())
    lost = 1 - np.abs(flat.sum(0)).sum() / mass.sum()
    assert found.cancelled == pytest.approx(lost)
    np.testing.assert_allclose(found.changed, (flat != 0).mean(1))


def test_sums_of_parts_add_up():
    """Tensors in two halves give what they give as a whole; means of cosines do not."""
    base, experts = models(2, (100,), np.float64)
    base[:50] *= 10
    experts[0][:50] = base[:50] + 3 * (experts[1][:50] - base[:50])
    cuts = [0.01, 0.01]
    halves = [
        diagnose.sums(base[s], [x[s] for x in experts], cuts)
        for s in (slice(50), slice(50, None))
    ]
    whole = diagnose.sums(base, experts, cuts)
    for a, b in zip(diagnose.add(*halves), whole, strict=True):
        np.testing.assert_allclose(a, b)
    mean = np.mean([diagnose.statistics(h).cosine[0, 1] for h in halves])
    assert abs(mean - diagnose.statistics(whole).cosine[0, 1]) > 0.05


def test_signs_of_opposites_and_equals():
    draw = np.random.default_rng(1).standard_normal(1000)
    assert diagnose.sign_conflict([draw, -draw]) == (1, 1, 1)
    same = diagnose.sign_conflict([draw, 2 * draw])
    assert same[:2] == (0, 0)
    assert same.cancelled == pytest.approx(0, abs=1e-12)
    other = np.random.default_rng(2).standard_normal(1000)
    assert diagnose.sign_conflict([draw, other]).counted == pytest.approx(0.5, abs=0.06)
    tiny = [np.full(4, 1e-30, np.float32), np.full(4, -1e-30, np.float32)]
    assert diagnose.sign_conflict(tiny).counted == 1  # products of these vanish


def test_cut_and_overlap_are_those_of_a_sort():
    draw = np.random.default_rng(3)
    a, b = draw.standard_normal((2, 30, 50))
    zero = np.zeros_like(a)
    k = int(0.2 * a.size)
    tops = [set(np.argsort(-np.abs(x).ravel())[:k].tolist()) for x in (a, b)]
    assert diagnose.cut(zero, a) == np.sort(np.abs(a).ravel())[-k]
    found = diagnose.overlap([a, b])
    assert found[0, 1] == pytest.approx(len(tops[0] & tops[1]) / k)
    assert found[0, 0] == 1
    # zeros are not among the largest, however few others there are
    sparse = np.zeros(100)
    sparse[3] = 1.0
    dense = np.arange(1.0, 101)
    assert diagnose.overlap([sparse, dense])[0, 1] == 0
    sums = diagnose.sums(np.zeros(100), [sparse, dense], [0.0, 81.0])
    assert np.diag(sums.top).tolist() == [1, 20]


def test_cut_of_a_large_tensor_meets_all_columns():
    """Where columns differ in size, a sample of one column would be far off."""
    draw = np.random.default_rng(4)
    x = draw.standard_normal((4096, 128)).astype(np.float32)
    x *= np.arange(1, 129)
    found = diagnose.cut(np.zeros_like(x), x)
    assert (np.abs(x) >= found).mean() == pytest.approx(0.2, abs=0.005)
    assert (np.abs(x) >= np.quantile(np.abs(x[:, 0]), 0.8)).mean() > 0.9


def entropy_rank(a):
    s = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    p = s[s > 1e-12 * s[0]] / s.sum()
    return np.exp(-(p * np.log(p)).sum()), (s**2).sum() / s[0] ** 2


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (1, 9)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_effective_rank_is_that_of_an_svd(shape, dtype):
    draw = np.random.default_rng(5)
    base = draw.standard_normal(shape).astype(dtype)
    delta = draw.standard_normal(shape).astype(dtype)
    gram = diagnose.smaller_gram(base, base + delta, entries=100)
    assert gram.shape == (min(shape),) * 2
    found = diagnose.effective_rank(gram)
    wanted = entropy_rank((base + delta) - base)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_effective_rank_of_few_directions():
    draw = np.random.default_rng(6)
    low = draw.standard_normal((300, 4)) @ draw.standard_normal((4, 200))
    found = diagnose.effective_rank(diagnose.smaller_gram(0 * low, low))
    np.testing.assert_allclose(found, entropy_rank(low), rtol=1e-6)
    narrow = low.astype(np.float32)
    gram = diagnose.smaller_gram(0 * narrow, narrow)
    assert diagnose.effective_rank(gram).effective == pytest.approx(found[0], rel=1e-3)
    # the control: with rounding taken for directions, the rank is too large
    squares = np.abs(np.linalg.eigvalsh(gram)).astype(np.float64)
    p = np.sqrt(squares) / np.sqrt(squares).sum()
    assert np.exp(-(p * np.log(p)).sum()) > 1.05 * found.effective
    assert diagnose.effective_rank(np.zeros((3, 3))) == (0, 0)


def checkpoint(**arrays):
    layouts = {n: Layout(a.dtype, a.shape) for n, a in arrays.items()}
    return Checkpoint(layouts, arrays.__getitem__)


def test_numbers_that_are_not_finite_are_named_and_left_out():
    base, experts = models(2, (6, 5), np.float32)
    fine = [x.copy() for x in (base, *experts)]
    experts[0][2, 3], experts[1][4, 1], experts[1][5, 0] = np.nan, np.inf, -np.inf
    opened = [checkpoint(w=x) for x in (base, *experts)]
    (found,) = compare(opened, [Matched("w", ("w",) * 3, (6, 5), False)])
    assert [(b.model, b.name, b.entries, b.at) for b in found.bad] == [
        (1, "w", 1, (2, 3)),
        (2, "w", 2, (4, 1)),
    ]
    for x in fine:
        x[2, 3] = x[4, 1] = x[5, 0] = 0
    wanted = diagnose.sums(fine[0], fine[1:], [1e9, 1e9])
    np.testing.assert_allclose(found.sums.gram, wanted.gram, rtol=1e-5)
    assert found.equal == (False, False)


def test_finite_numbers_may_overflow_when_squared():
    base, expert = np.zeros(3, np.float32), np.float32([1e30, 0, 0])
    opened = [checkpoint(w=base), checkpoint(w=expert)]
    (found,) = compare(opened, [Matched("w", ("w", "w"), (3,), False)])
    assert found.bad == ()
    assert found.sums.gram[1, 1] == pytest.approx(1e60)


def test_threads_change_nothing():
    pairs = {f"w{i}": models(1, (30 + i, 7), np.float32, i) for i in range(12)}
    opened = [
        checkpoint(**{n: p[0] for n, p in pairs.items()}),
        checkpoint(**{n: p[1][0] for n, p in pairs.items()}),
    ]
    matched = correspond(["A", "B"], opened, [{}, {}]).matched
    one, three = (compare(opened, matched, ["w3"], workers=w) for w in (1, 3))
    assert [c.name for c in one] == [c.name for c in three] == list(pairs)
    for a, b in zip(one, three, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.sums, b.sums, strict=True))
        assert a.ranks == b.ranks
        assert (a.ranks is not None) == (a.name == "w3")


def test_ranks_are_spread_over_layers_within_the_budget():
    def layer(i):
        return [Matched(f"{i}.{n}", (), (64, 64), False) for n in "ab"]

    parts = {"embedding": [Matched("e", (), (1000, 64), False)]}
    parts |= {f"layer {i}": layer(i) for i in range(9)}
    parts["head"] = [Matched("h", (), (WIDEST + 1, WIDEST + 1), False)]
    one = 2 * rank_work((64, 64))
    assert choose(parts, 2.9 * one) == ["4.a", "4.b", "2.a", "2.b"]
    assert choose(parts, 0.6 * one) == ["4.a"]
    everything = choose(parts, math.inf)
    assert len(everything) == len(set(everything)) == 19
    assert "h" not in everything


def test_names_and_shapes_are_told():
    f = np.float32
    one = checkpoint(
        **{"model.embed_tokens.weight": np.zeros((5, 4), f), "a": np.zeros(3, f)},
        **{"lm_head.weight": np.zeros((5, 4), f), "b": np.zeros(2, f)},
    )
    two = checkpoint(
        **{"model.embed_tokens.weight": np.zeros((6, 4), f), "a": np.zeros(4, f)},
        extra=np.zeros(1, np.float16),
    )
    found = correspond(["A", "B"], [one, two], [{}, {}])
    text = "\n".join(found.findings)
    assert "B ties it to model.embed_tokens.weight" in text
    assert "wrong: tensors: B lacks b, which A has" in text
    assert "wrong: tensors: B has extra, which A lacks" in text
    assert "wrong: shape: a: A [3], B [4]; only tensors of one shape" in text
    assert "A [5, 4], B [6, 4] and 1 more; set tokenizer: {source: union}" in text
    assert "suspicious: stored type: A float32, B float16+float32" in text
    assert found.matched == []
    assert len(found.apart) == 4
    assert correspond(["A", "C"], [one, one], [{}, {}]).findings == []


def said(base, experts, names, ranks=()):
    opened = [checkpoint(w=x) for x in (base, *experts)]
    matched = [Matched("w", ("w",) * len(opened), base.shape, False)]
    found = compare(opened, matched, ranks)
    bad = [b for c in found for b in c.bad]
    return " ".join(verdict(row("all", found), names, "A", bad))


def test_the_verdict_follows_from_the_numbers():
    draw = np.random.default_rng(7)
    base, b, c = draw.standard_normal((3, 100, 80))
    small = 1e-3
    text = said(base, [base + small * b, base + small * c], ["B", "C"])
    assert "nearly orthogonal" in text
    assert "below 50%, as fine-tunes" in text
    assert "DARE" not in text
    text = said(base, [base + small * b, base + 5 * small * b], ["B", "C"])
    assert "moved the same way" in text
    assert "The delta of C is 5.0 times as long" in text
    assert "Below 20% there is little" in text
    text = said(base, [base + small * b, base - small * b], ["B", "C"])
    assert "point against each other" in text
    assert "elect signs (TIES)" in text
    text = said(base, [b, base + 0.05 * c], ["B", "C"])
    assert "Above 50% (B)" in text
    assert "DARE" in text
    few = np.where(np.arange(80) < 8, small * b, 0)
    assert "B changed 10% of the entries" in said(base, [base + few], ["B"])
    low = small * np.outer(b[:, 0], c[0])
    assert "Iso-C" in said(base, [base + low], ["B"], ranks=["w"])
    assert "Iso-C" not in said(base, [base + small * b], ["B"], ranks=["w"])
    b[0, 1] = np.nan
    assert "first nan in w at [0, 1]" in said(base, [b], ["B"])
