"""MinED: every distance against the table, ties, scripts, words of integers, bounds."""

import os
import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies as voc

from collab_jax import combine, pool, warp
from collab_jax.ensemble.vocabulary import edit_distance
from collab_jax.ensemble.vocabulary.edit_distance import complete, nearest
from collab_jax.ensemble.vocabulary.lift import borrow, carry
from collab_jax.io import hub
from collab_jax.io.bridge import bridge
from collab_jax.io.kept import kept
from collab_jax.io.tokenizer import load_tokenizer, token_bytes
from collab_jax.testing import check_lm
from collab_jax.translate import spelled


def levenshtein(one, other):
    """The table, row by row."""
    row = [*range(len(other) + 1)]
    for i, x in enumerate(one, 1):
        before, row = row, [i]
        for j, y in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def naive(queries, candidates):
    found = []
    for query in queries:
        options = [
            (levenshtein(query.decode(errors="surrogateescape"),
                         text.decode(errors="surrogateescape")), c)
            for c, text in enumerate(candidates) if text
        ]  # fmt: skip
        distance, c = min(options) if query else (-1, -1)
        found.append((c, distance))
    return found


def drawn(rng, letters, count, longest):
    sizes = rng.integers(0, longest + 1, count)
    return ["".join(rng.choice([*letters], n)).encode() for n in sizes]


def check(queries, candidates):
    found = nearest(queries, candidates)
    pairs = [*zip(found.candidate.tolist(), found.distance.tolist(), strict=True)]
    assert pairs == naive(queries, candidates)


def test_every_distance_is_that_of_the_table(monkeypatch):
    monkeypatch.setattr(edit_distance, "BLOCK", 32)
    rng = np.random.default_rng(0)
    check(drawn(rng, "abc", 90, 7), drawn(rng, "abd", 60, 7))
    check(drawn(rng, " aé東", 60, 5), drawn(rng, " aé", 40, 6))


def test_long_words_are_several_integers():
    rng = np.random.default_rng(1)
    texts = [drawn(rng, "ab", 1, n)[0] * 3 for n in (31, 32, 33, 40, 64, 65)]
    exact = [b"a" * n for n in (31, 32, 33, 63, 64, 65, 96, 97)]
    check(texts + exact, [b"ab" * 16, b"b" * 64, b"a" * 40 + b"b" * 30, b"a" * 95])


def test_bytes_that_are_no_text_and_characters_that_no_candidate_has():
    check([b"\xe6\x9d", b"\xe6", b"\x00", "東京".encode()], [b"\xe6", b"ab", b"\x00x"])
    check([b"xyz", "ж".encode(), b""], [b"qqqq", b"qq", b"", b"q"])
    found = nearest([b"a"], [b"", b""])
    assert found.candidate.tolist() == found.distance.tolist() == [-1]


def test_the_first_of_equals_is_taken():
    assert nearest([b"ac"], [b"zz", b"bc", b"ab", b"aa"]).candidate[0] == 1
    assert nearest([b"ac"], [b"zz", b"ab", b"bc", b"aa"]).candidate[0] == 1


def test_a_map_is_completed():
    every, words = voc.UNION, voc.WORDS[0]
    text = [w.encode() for w in every]
    own = [w.encode() for w in words]
    made = voc.BRIDGES[0]
    known = np.where(made.shared(), made.spelling[:, 0], -1)
    index = complete(known, text, own)
    assert [words[u] for u in index] == ["a", "b", "ab", "c", "a", "ab"]  # ba, cab
    with pytest.raises(ValueError, match=r"\[2\] is expected"):
        complete(known, text[:2], own)
    with pytest.raises(ValueError, match="below 2"):
        complete(known, text, own[:2])


INDEX = [
    jnp.asarray(complete(np.where(b.shared(), b.spelling[:, 0], -1),
                         [w.encode() for w in voc.UNION], [w.encode() for w in some]))
    for b, some in zip(voc.BRIDGES, voc.WORDS, strict=True)
]  # fmt: skip


def borrowing(lms=voc.LMS):
    """PackLLM's reading of MinED: logits of the most similar token, fused as logits."""
    parts = zip(lms, voc.BRIDGES, INDEX, strict=True)
    return combine.product(
        [
            warp.warp(spelled(lm, b, 3.0), borrow(i, b.pivot.shape[0]))
            for lm, b, i in parts
        ],
        pool.linear(0.3, 0.7),
    )


def test_borrowed_logits_are_the_naive_ones():
    found = voc.laws(borrowing(), voc.PARAMS)
    words = [naive([w.encode() for w in voc.UNION], [w.encode() for w in some])
             for some in voc.WORDS]  # fmt: skip
    for t, row in enumerate(voc.readings(voc.TEXT)):
        z = sum(
            w * z[[c for c, _ in pairs]]
            for w, z, pairs in zip((0.3, 0.7), row, words, strict=True)
        )
        np.testing.assert_allclose(found[t], voc.softmax(z), atol=1e-6)
        exact = np.where(np.asarray(voc.BRIDGES[0].shared()), z, -np.inf)
        assert abs(found[t] - voc.softmax(exact)).max() > 1e-3


def test_mass_is_carried_to_the_most_similar_token():
    """The second member's words in the first's vocabulary: cab to ab, ba to b or a."""
    words = voc.WORDS
    made = voc.bridge(words[0], words[1])
    text, own = ([w.encode() for w in some] for some in words)
    home = complete(made.pivot, own, text)
    assert [words[0][v] for v in home] == ["b", "a", "c", "a", "ab", "a"]
    z = np.random.default_rng(0).normal(size=6)
    lifted = np.exp(np.asarray(carry(jnp.asarray(home), 4)(jnp.asarray(z))))
    expected = np.bincount(home, voc.softmax(z), 4)
    np.testing.assert_allclose(lifted, expected, rtol=1e-5)
    assert lifted.sum() == pytest.approx(1.0)  # nothing is lost


def test_laws_and_greedy_text():
    check_lm(borrowing(), voc.PARAMS, voc.V, tolerance=1e-6, jit=True)
    voc.check_speculates(borrowing(), voc.PARAMS)


def test_arrays_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path))
    calls = []

    def make():
        calls.append(None)
        return {"x": np.arange(len(calls))}

    assert [len(kept("a", [b"1", b"2"], make)["x"]) for _ in range(2)] == [1, 1]
    assert len(kept("a", [b"12"], make)["x"]) == 2
    assert len(kept("b", [b"1", b"2"], make)["x"]) == 3
    assert not [*tmp_path.rglob("*.partial")]

    def fail():
        raise KeyError("no")

    with pytest.raises(KeyError):
        kept("c", [], fail)
    known, texts = np.array([-1, 0]), ([b"ab", b"b"], [b"b", b"abc"])
    for _ in range(2):
        assert complete(known, *texts, keep=True).tolist() == [0, 0]
        monkeypatch.setattr(edit_distance, "nearest", fail)
    assert len([*tmp_path.rglob("*")]) == 5


@pytest.mark.slow
@pytest.mark.real
def test_real_vocabularies_take_less_than_a_minute():
    """262k tokens to 49k; a sample against the table. Times are printed."""
    names = "smollm2-135m-instruct", "gemma-3-270m"
    small, large = (load_tokenizer(hub.fetch(name)) for name in names)
    own, other = token_bytes(small), token_bytes(large)
    made = bridge(small, large, fallback=0)
    begin = time.perf_counter()
    home = complete(np.asarray(made.pivot), other[: made.pivot.shape[0]], own)
    took = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{took:.1f} s, peak {peak:.2f} GiB on {os.cpu_count()} cores")
    assert took < 60
    open_ = np.flatnonzero(np.asarray(made.pivot) < 0)
    some = np.random.default_rng(0).choice(open_, 3, replace=False)
    expected = naive([other[u] for u in some], own)
    assert home[some].tolist() == [c for c, _ in expected]
