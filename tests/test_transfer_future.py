"""Future constraint satisfaction: twins, laws, speculation, identities, mistakes."""

import jax.numpy as jnp
import numpy as np
import pytest
import transferring as own
from transferring import TABLE, TABLES, VOCAB, check_methods, log_softmax, logits

from collab_jax import beam, decode, warp
from collab_jax.combine import prefixed
from collab_jax.cooperate.transfer import future, reward
from collab_jax.testing import check_lm

START = [[0]] * 3
PROMPTS = [[3, 1, 5, 2], [6], [2, 2, 4]]
# two constraints a row, behind a separator of their own, of unequal lengths
TEXTS = [[[5, 1], [5, 2, 3]], [[4, 0, 0], [6, 6]], [[5, 3], [5, 1]]]
K, SIZE = 3, 3


def filled(texts=TEXTS):
    tokens = np.zeros((len(texts), 2, SIZE), np.int32)
    for row, two in enumerate(texts):
        for i, text in enumerate(two):
            tokens[row, i, : len(text)] = text
    length = np.array([[len(text) for text in two] for two in texts])
    return jnp.asarray(tokens), jnp.asarray(length)


def naive_likelihoods(lm, params, text, constraints, reduce=np.mean):
    """Of every constraint behind a text, each token read as the end of its own text."""
    found = []
    for separator, *asked in constraints:
        steps, read = [], [*text, separator]
        for token in asked:
            steps.append(log_softmax(logits(lm, params, read))[token])
            read.append(token)
        found.append(reduce(steps))
    return found


@pytest.mark.parametrize("kind", ["table", "model"])
def test_decodes_as_its_twin(kind):
    """The base has prompts of its own, which the judge does not see."""
    lm, members = own.kinds()[kind]
    base, judge = members[:2]
    params = (base, *decode.pad(PROMPTS)), (judge, *filled())

    def make(s):
        strength = 1.0 if s is None else s
        return future.anticipating(prefixed(lm, 2), lm, 2, SIZE, strength, K, width=2)

    def behind(s):
        def law(text, row):
            z = log_softmax(logits(lm, base, PROMPTS[row] + text[1:]))
            found = np.full(VOCAB, -np.inf)
            for v in np.argsort(-z, kind="stable")[:K]:
                seen = [*text, int(v)]
                r = naive_likelihoods(lm, judge, seen, TEXTS[row])
                found[v] = z[v] + s * np.mean(r)
            return found

        return law

    knobs = {"toward": 2.0, "away": -1.5}
    cases = {name: ((jnp.array(s), params), behind(s)) for name, s in knobs.items()}
    laws = ("toward",) if kind == "table" else ()
    rest = {"atol": 1e-3, "tolerance": 1e-4}
    check_methods(own.knobbed(make), cases, START, laws, **rest)


@pytest.mark.parametrize("width", [1, 3, 9])
@pytest.mark.parametrize("reduce", [future.average, future.total, future.final])
def test_likelihoods_of_what_follows(reduce, width):
    naive = {
        future.average: np.mean,
        future.total: np.sum,
        future.final: lambda steps: steps[-1],
    }
    asked = future.followed(TABLE, 2, SIZE, reduce, width)
    params = TABLES[1], *filled()
    texts = jnp.array([[1, 2, 3, 4], [0, 0, 6, 1], [5, 4, 3, 2]])
    out, state = asked.extend(params, asked.init(params, 3, 4), texts)
    for row, text in enumerate(texts.tolist()):
        for t in range(len(text)):
            seen = text[: t + 1]
            expected = naive_likelihoods(
                TABLE, TABLES[1], seen, TEXTS[row], naive[reduce]
            )
            np.testing.assert_allclose(out.logits[row, t], expected, rtol=1e-4)
    assert state.inner.length.tolist() == [4, 4, 4]  # nothing of the constraints stays


def test_a_judge_of_what_follows_obeys_the_laws():
    lm = future.followed(own.MODEL, 2, SIZE, width=2)
    params = own.models()[1], *filled()
    check_lm(lm, params, VOCAB, tolerance=5e-5, jit=True)


def anticipated(strength, **rest):
    return future.anticipating(TABLE, TABLE, 2, SIZE, strength, K, **rest)


def run(lm, params, prompts=START):
    decoder = decode.greedy(lm, own.NEW, chunk=4)
    return decode.run(decoder, params, *decode.pad(prompts), own.KEY)


def test_identities():
    params = TABLES[0], (TABLES[1], *filled())
    found = run(anticipated(0.0), params)
    plain = run(warp.warp(TABLE, warp.top_k(K)), TABLES[0])
    assert (found.tokens == plain.tokens).all()
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-5)
    # a judge that knows nothing finds every constraint as likely behind any candidate
    found = run(anticipated(5.0), (TABLES[0], (TABLES[1] * 0, *filled())))
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-5)
    # two equal constraints are one
    twice = TABLES[0], (TABLES[1], *filled([[one[0], one[0]] for one in TEXTS]))
    tokens, length = filled()
    single = TABLES[0], (TABLES[1], tokens[:, :1], length[:, :1])
    one = future.anticipating(TABLE, TABLE, 1, SIZE, 2.0, K)
    assert (run(anticipated(2.0), twice).tokens == run(one, single).tokens).all()


def test_a_search_adds_up_likelihoods_and_constraints():
    """The method's own decoding: the scores of a beam are not normalised."""
    lm, params = anticipated(2.0), (TABLES[0], (TABLES[1], *filled()))
    search = beam.search(lm, 3, 2, measure=lambda z: z, length_penalty=0.0, chunk=2)
    found = decode.run(search, params, *decode.pad(START), own.KEY)
    for row in range(3):
        text, total = [0], 0.0
        for token in found.tokens[row, 1:4].tolist():
            z = log_softmax(logits(TABLE, TABLES[0], text))[token]
            text.append(token)
            r = naive_likelihoods(TABLE, TABLES[1], text, TEXTS[row])
            total += z + 2.0 * np.mean(r)
        np.testing.assert_allclose(found.scores[row], total, rtol=1e-4)


def test_wrong_forms_are_seen():
    text, row = [0, 4, 6], 0
    args = TABLE, TABLES[1], text, TEXTS[row]
    right = naive_likelihoods(*args)
    asked = future.followed(TABLE, 2, SIZE)
    params = TABLES[1], *(leaf[:1] for leaf in filled())
    out, _ = asked.extend(params, asked.init(params, 1, 3), jnp.array([text]))
    np.testing.assert_allclose(out.logits[0, -1], right, rtol=1e-4)
    # the separator counted as a token of the constraint; the second behind the first
    counted = naive_likelihoods(*args[:3], [[text[-1], *c] for c in TEXTS[row]])
    joined = naive_likelihoods(*args[:2], text + TEXTS[row][0], TEXTS[row][1:])
    assert abs(np.array(right) - counted).max() > 1e-2
    assert abs(right[1] - joined[0]) > 1e-2


def test_refuses():
    with pytest.raises(ValueError, match="0 texts"):
        future.followed(TABLE, 0, 3)
    with pytest.raises(ValueError, match="texts of 1 tokens"):
        future.followed(TABLE, 1, 1)
    lm = future.followed(TABLE, 1, SIZE)
    with pytest.raises(ValueError, match=r"texts of shape \(3, 2, 3\)"):
        lm.init((TABLES[0], *filled()), 3, 4)


def test_any_lm_may_judge():
    """Rewards, and likelihoods of texts, are asked for by one protocol."""
    tokens, length = filled()
    judge = future.followed(TABLE, 2, SIZE, width=1 + K)
    lm = reward.args(TABLE, judge, 2.0, K, judge=lambda y: y.mean(-1))
    params = TABLES[0], (TABLES[1], tokens, length)
    assert (run(lm, params).tokens == run(anticipated(2.0), params).tokens).all()
