"""EVA: the alignment in NumPy, the pool word by word, laws and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies as voc

from collab_jax import combine, pool
from collab_jax.ensemble.vocabulary import alignment as alignments
from collab_jax.ensemble.vocabulary.alignment import Alignment, align, exact_pairs
from collab_jax.ensemble.vocabulary.eva import added, aligned, eva, likeliest
from collab_jax.testing import check_lm
from collab_jax.translate import spelled

WEIGHTS, TOP = (0.4, 0.6), 4
PARAMS = voc.tables(7)  # the members often disagree
PIVOT, MEMBER = len(voc.WORDS[0]), len(voc.WORDS[1])
# the text stands in the first member's tokens
BRIDGES = [voc.bridge(voc.WORDS[0], words) for words in voc.WORDS]
FOUND = Alignment(
    jnp.array([[1, 2], [0, 2], [3, 0], [1, 0], [2, 3], [0, 1]]),
    jnp.array([[0.9, 0.2], [1.0, 0.3], [0.8, 0.0], [0.5, 0.4], [0.6, 0.6], [0.0, 0.0]]),
)
TEXT = [voc.WORDS[0].index(w) for w in ("ab", "c", "a", "b", "ab", "c", "a")]


def model(agree=None, lms=voc.LMS, **more):
    return eva(lms, BRIDGES, [None, FOUND], *WEIGHTS, top=TOP, agree=agree, ratio=3.0,
               **more)  # fmt: skip


def naive_laws(row, normalised=False):
    """What both members say of the text's tokens, token by token."""
    laws = []
    for z, found in zip(row, (None, FOUND), strict=True):
        best = np.argsort(-z, kind="stable")[:TOP]
        law = np.zeros(PIVOT)
        for u, p in zip(best, voc.softmax(z[best]), strict=True):
            if found is None:
                law[u] += p
            else:
                for v, s in zip(found.match[u], found.score[u], strict=True):
                    law[v] += float(s) * p
        laws.append(law / law.sum() if normalised else law)
    return laws


def naive(rows, agree=None, **mistake):
    result = []
    for row in rows:
        laws, left = naive_laws(row, **mistake), [0, 1]
        if agree:
            others = [[*np.argsort(-law, kind="stable")[:agree]] for law in laws]
            heard = [n for n in (0, 1) if laws[n].argmax() in others[1 - n]]
            left = heard or left
        p = sum(WEIGHTS[n] * laws[n] for n in left)
        result.append(p / p.sum())
    return np.array(result)


@functools.cache
def readings():
    return voc.readings(TEXT, every=voc.WORDS[0], params=PARAMS)


@pytest.mark.parametrize("agree", [None, 1, 2])
def test_the_law_is_the_naive_one(agree):
    found = voc.laws(model(agree), PARAMS, TEXT)
    np.testing.assert_allclose(found, naive(readings(), agree), atol=1e-6)
    wrong = naive(readings(), None if agree == 2 else 2)
    assert abs(found - wrong).max() > 0.1
    if agree is None:
        wrong = naive(readings(), normalised=True)
        assert abs(found - wrong).max() > 0.01


def test_the_law_of_transformers_is_the_naive_one():
    lms, params = zip(*voc.SMALL, strict=True)
    found = voc.laws(model(lms=lms), params, TEXT[:4])
    rows = voc.model_readings(TEXT[:4], every=voc.WORDS[0])
    np.testing.assert_allclose(found, naive(rows), atol=1e-5)


def test_laws():
    check_lm(model(2), PARAMS, PIVOT, tolerance=1e-6, jit=True)


def test_greedy_text_is_the_same_under_speculation():
    best = model(2)
    voc.check_speculates(best, PARAMS, PIVOT, prompts=[[0], [3, 1, 2, 0], [3, 3]])


def test_a_model_with_itself_is_plain_averaging():
    """Matched with itself by its embeddings, at any width of agreement."""
    rng = np.random.default_rng(0)
    words = voc.WORDS[0]
    rows = rng.normal(size=(PIVOT, 6))
    pairs = np.stack([np.arange(PIVOT)] * 2, axis=1)
    own = align(rows, rows, pairs, matches=1)
    lms, params = (voc.LMS[0],) * 2, (PARAMS[0], PARAMS[0][::-1])
    bridges = [voc.bridge(words, words)] * 2
    plain = combine.product(lms, pool.mixture(*WEIGHTS))
    both = eva(lms, bridges, [None, own], *WEIGHTS, agree=None)
    expected = voc.laws(plain, params, TEXT)
    np.testing.assert_allclose(voc.laws(both, params, TEXT), expected, atol=1e-5)
    few = eva(lms, bridges, [None, own], *WEIGHTS, agree=None, top=1)
    assert abs(voc.laws(few, params, TEXT) - expected).max() > 0.05


def naive_alignment(source, target, pairs, matches, least):
    """With loops, and the rotation that the scatter of the pairs has."""

    def directions(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows - rows.mean(0)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    x, y = directions(source), directions(target)
    a, _, b = np.linalg.svd(sum(np.outer(x[u], y[v]) for u, v in pairs))
    width = min(x.shape[1], y.shape[1])
    cos = (x @ a[:, :width]) @ (y @ b[:width].T).T
    found = []
    for u in range(len(x)):
        score = np.array([2 * cos[u, v] - cos[:, v].max() for v in range(len(y))])
        best = np.argsort(-score, kind="stable")[:matches]
        kept = [(int(v), score[v]) for v in best if score[v] >= least]
        if len(kept) > 5 and np.std([s for _, s in kept]) <= 0.01:
            kept = []
        found.append(kept)
    return found


@pytest.mark.parametrize("cells", [alignments.CELLS, 70])
def test_the_alignment_is_the_naive_one(cells, monkeypatch):
    monkeypatch.setattr(alignments, "CELLS", cells)  # blocks of three rows
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(30, 5))
    source = hidden @ rng.normal(size=(5, 7)) + 0.1 * rng.normal(size=(30, 7))
    target = hidden[:23] @ rng.normal(size=(5, 9)) + 0.1 * rng.normal(size=(23, 9))
    pairs = np.stack([np.arange(12)] * 2, axis=1)
    found = align(source, target, pairs, matches=8, least=0.1)
    expected = naive_alignment(source, target, pairs, 8, 0.1)
    for u, wanted in enumerate(expected):
        score, index = np.asarray(found.score[u]), np.asarray(found.match[u])
        kept = [(int(v), s) for v, s in zip(index, score, strict=True) if s]
        assert [v for v, _ in kept] == [v for v, _ in wanted]
        np.testing.assert_allclose([s for _, s in kept], [s for _, s in wanted],
                                   atol=1e-5)  # fmt: skip
    assert sum(map(len, expected)) > 40
    unaligned = naive_alignment(source[:, :7], target[:, :7], [(0, 5), (3, 1)], 8, 0.1)
    assert unaligned != expected


def test_other_coordinates_change_nothing():
    """Tokens without a pair find their twin; a hub matches little."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(40, 8))
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    order = rng.permutation(40)
    target = (rows @ turn)[order]
    where = np.argsort(order)  # token u of the source is token where[u]
    pairs = np.stack([np.arange(20), where[:20]], axis=1)
    found = align(rows, target, pairs, matches=3)
    assert found.match[:, 0].tolist() == where.tolist()
    np.testing.assert_allclose(found.score[:, 0], 1.0, atol=1e-5)


def test_rows_that_say_nothing_and_rows_that_are_given():
    same = np.full((1, 10), 0.2, np.float32) + np.linspace(0, 0.01, 10)
    wide = np.linspace(0.05, 0.9, 10)[None]
    score = np.concatenate([same, wide, same * (np.arange(10) < 5)])
    kept = alignments._meaningful(score.astype(np.float32), 0.1)
    assert (kept > 0).sum(1).tolist() == [0, 9, 5]
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9, 4))
    pairs = np.stack([np.arange(9)] * 2, axis=1)
    found = align(rows, rows, pairs, fixed=np.array([[2, 7]]))
    assert (found.match[2, 0], found.score[2, 0]) == (7, 1.0)
    assert not found.score[2, 1:].any()


def test_an_alignment_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path))
    rows = np.random.default_rng(4).normal(size=(9, 4))
    pairs = np.stack([np.arange(9)] * 2, axis=1)
    one = align(rows, rows, pairs, keep=True)
    monkeypatch.setattr(alignments, "_matched", None)
    two = align(rows, rows, pairs, keep=True)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    with pytest.raises(TypeError):
        align(rows, rows, pairs, least=0.2, keep=True)


def test_pairs_are_what_both_have():
    assert exact_pairs(BRIDGES[1]).tolist() == [[1, 0], [0, 1], [2, 3]]


def test_what_is_forbidden_and_what_is_no_number():
    law = added([likeliest(TOP), aligned(FOUND, PIVOT, TOP)], *WEIGHTS, agree=1)
    first = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    second = jnp.array([-jnp.inf, -jnp.inf, 0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    found = np.exp(np.asarray(law([first, second])))
    assert found.tolist() == pytest.approx([0.4, 0.0, 0.0, 0.6 * 0.8])
    dead = law([jnp.full(4, -jnp.inf), jnp.full(6, -jnp.inf)])
    assert bool(jnp.isneginf(dead).all())
    for z in ([first.at[1].set(jnp.nan), second], [first, second.at[1].set(jnp.nan)]):
        assert bool(jnp.isnan(law(z)).any())


def test_weights_are_swept_in_one_trace():
    traces = []
    readers = [spelled(lm, b, 3.0) for lm, b in zip(voc.LMS, BRIDGES, strict=True)]
    text = jnp.array([TEXT])

    @jax.jit
    def nats(weight, found):
        traces.append(None)
        lifts = [likeliest(TOP), aligned(found, PIVOT, TOP)]
        lm = combine.product(readers, added(lifts, weight, 1 - weight))
        out, _ = lm.extend(PARAMS, lm.init(PARAMS, *text.shape), text)
        z = jax.nn.log_softmax(out.logits[0, :-1])
        z = jnp.where(jnp.isneginf(z), 0.0, z)
        return -jnp.take_along_axis(z, text[0, 1:, None], 1).mean()

    values = [float(nats(w, FOUND)) for w in (0.2, 0.499, 0.501)]
    assert len(traces) == 1
    slope = float(jax.grad(nats)(0.5, FOUND))
    assert slope == pytest.approx((values[2] - values[1]) / 0.002, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: align(np.eye(2), np.eye(2), []), "no pairs"),
        (lambda: align(np.eye(2), np.eye(3), [[0, 3]]), r"up to \[0, 3\].* \[2, 3\]"),
        (lambda: added([likeliest()], agree=0), "agree = 0"),
        (lambda: added([likeliest()], -1.0), "weight of -1"),
        (lambda: added([likeliest()])([jnp.zeros(2)] * 2), "1 lifts and 2 weights"),
        (lambda: aligned(FOUND, PIVOT)(jnp.zeros(5)), "5 tokens for an alignment of 6"),
        (lambda: eva(voc.LMS, BRIDGES, [None]), "1 alignments for 2 members"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
