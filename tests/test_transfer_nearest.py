"""kNN-LM: exact search, the neighbours' law, and the LM against naive twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transferring as own
from transferring import MODEL, VOCAB, check_methods, last, log_softmax, read

from collab_jax import decode, pool
from collab_jax.cooperate.transfer import nearest as knn

TEXTS = [[1, 2, 3, 4, 5, 6, 0, 1, 2], [4, 3, 2], [0, 6, 4, 1, 5, 5]]


def store_of(params):
    return knn.remember(MODEL, params, *decode.pad(TEXTS), chunk=4)


def naive_entries(params):
    """(key, token) of every place, each text read alone."""
    for text in TEXTS:
        hidden = np.asarray(read(MODEL, params, text).features.hidden, np.float64)[0]
        for here in range(len(text) - 1):
            yield hidden[here], text[here + 1]


def naive_law(params, text, k, share, temperature):
    """`(1 - share) p + share p_kNN`, by loops."""
    out = read(MODEL, params, text)
    query = last(out.features.hidden, text)
    by_distance = sorted(
        (((query - key) ** 2).sum(), n, token)
        for n, (key, token) in enumerate(naive_entries(params))
    )
    votes = np.zeros(VOCAB)
    for distance, _, token in by_distance[:k]:
        votes[token] += np.exp(-(distance - by_distance[0][0]) / temperature)
    p = np.exp(log_softmax(last(out.logits, text)))
    with np.errstate(divide="ignore"):
        return np.log((1 - share) * p + share * votes / votes.sum())


def test_a_datastore_holds_every_place():
    params = own.models()[0]
    store, expected = store_of(params), list(naive_entries(params))
    kept = np.asarray(store.tokens) >= 0
    assert kept.sum() == len(expected)
    assert np.asarray(store.tokens)[kept].tolist() == [token for _, token in expected]
    keys = np.stack([key for key, _ in expected])
    found = np.asarray(store.keys + store.centre)[kept]
    np.testing.assert_allclose(found, keys, atol=1e-4)


def test_decodes_as_its_twin():
    params = own.models()[0]
    whole = params, store_of(params)
    settings = {"share .25": (0.25, 8.0), "share .9": (0.9, 2.0)}

    def make(knobs):
        share, temperature = (0.5, 1.0) if knobs is None else knobs
        mixed = pool.mixture(1 - share, share)
        return knn.nearest(MODEL, mixed, 4, temperature=temperature, block=5)

    def behind(share, temperature):
        return lambda text, row: naive_law(params, text, 4, share, temperature)

    cases = {
        name: ((jnp.array(knobs), whole), behind(*knobs))
        for name, knobs in settings.items()
    }
    lm = own.knobbed(make)
    check_methods(lm, cases, laws=("share .9",), atol=5e-4, tolerance=2e-4)


def test_identities():
    params = own.models()[0]
    store, text = store_of(params), TEXTS[0]

    @jax.jit
    def laws(share, temperature, store):
        mixed = pool.mixture(1 - share, share)
        lm = knn.nearest(MODEL, mixed, 3, temperature=temperature)
        state = lm.init((params, store), 1, len(text))
        out, _ = lm.extend((params, store), state, jnp.array([text]))
        return jax.nn.softmax(out.logits)[0]

    plain = np.asarray(jax.nn.softmax(read(MODEL, params, text).logits))[0, : len(text)]
    alone = laws(0.0, 1.0, store)
    np.testing.assert_allclose(alone, plain, rtol=1e-5, atol=1e-7)
    empty = store._replace(tokens=jnp.full_like(store.tokens, -1))
    none = laws(0.5, 1.0, empty)
    np.testing.assert_allclose(none, plain, rtol=1e-5, atol=1e-7)
    # a text that is in the store finds itself
    found = laws(1.0, 1e-3, store)
    assert found[:-1].argmax(-1).tolist() == text[1:]
    assert found[:-1].max(-1).min() > 0.999


def test_search_is_exact_in_every_block():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(53, 6)).astype(np.float32) + 30  # products cancel
    tokens = rng.integers(0, 9, 53)
    tokens[::7] = -1
    queries = keys[:10] + 0.1 * rng.normal(size=(10, 6)).astype(np.float32)
    store = knn.datastore(jnp.asarray(keys), jnp.asarray(tokens))
    for block in (1, 5, 53, 1000):
        distance, token = knn.search(store, jnp.asarray(queries), 7, block)
        for q, query in enumerate(queries.astype(np.float64)):
            every = ((query - keys.astype(np.float64)) ** 2).sum(-1)
            every[tokens < 0] = np.inf
            best = np.argsort(every)[:7]
            np.testing.assert_allclose(distance[q], every[best], rtol=1e-3)
            assert token[q].tolist() == tokens[best].tolist()


def test_fewer_entries_than_neighbours():
    store = knn.datastore(jnp.eye(3), jnp.array([4, -1, 5]))
    distance, token = knn.search(store, jnp.zeros((2, 3)), 6)
    assert token.tolist() == [[4, 5, -1, -1, -1, -1]] * 2
    law = jnp.exp(knn.vote(distance, token, VOCAB))
    np.testing.assert_allclose(law[:, 4:6], 0.5, rtol=1e-6)
    assert not jnp.isnan(law).any()
    assert (knn.vote(distance[:, 2:], token[:, 2:], VOCAB) == -jnp.inf).all()


def test_far_neighbours_still_vote():
    """Distances that underflow as they are: only their differences count."""
    law = knn.vote(jnp.array([[900.0, 901.0]]), jnp.array([[0, 1]]), 2)
    expected = np.array([1, np.exp(-1)]) / (1 + np.exp(-1))
    np.testing.assert_allclose(np.exp(law)[0], expected, rtol=1e-5)


def test_the_temperature_and_the_share_are_learned():
    params = own.models()[0]
    store, text = store_of(params), jnp.array([[2, 3, 4, 5, 1, 6]])

    def nats(knobs):
        lm = knn.nearest(
            MODEL, pool.mixture(1 - knobs[0], knobs[0]), 4, temperature=knobs[1]
        )
        out, _ = lm.extend((params, store), lm.init((params, store), 1, 6), text)
        log_p = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(log_p, text[:, 1:, None], 2).mean()

    both = jax.jit(jax.value_and_grad(nats))
    at = jnp.array([0.4, 9.0])
    for n, step in enumerate((1e-2, 0.3)):
        move = jnp.zeros(2).at[n].set(step)
        slope = (both(at + move)[0] - both(at - move)[0]) / (2 * step)
        np.testing.assert_allclose(both(at)[1][n], slope, rtol=5e-2, atol=1e-4)


def test_refuses():
    params = own.models()[0]
    with pytest.raises(ValueError, match="k = 0"):
        knn.nearest(MODEL, pool.mixture(), 0)
    with pytest.raises(ValueError, match="temperature = 0"):
        knn.nearest(MODEL, pool.mixture(), 1, temperature=0)
    narrow = knn.datastore(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
    lm = knn.nearest(MODEL, pool.mixture(), 1)
    state = lm.init((params, narrow), 1, 2)
    with pytest.raises(ValueError, match=r"keys of width 3 .* width 16"):
        lm.extend((params, narrow), state, jnp.array([[1]]))
    with pytest.raises(ValueError, match="no hidden states"):
        knn.hidden(())
