"""Packing: every token is predicted once, nothing across texts, the same by seed."""

import itertools

import numpy as np
import pytest

from collab_jax.packing import Batch, batches, pack, rows

TEXTS = [[10, 11, 12, 13, 14], [20], [30, 31], [40, 41, 42, 43, 44, 45, 46]]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 40])
def test_every_token_is_predicted_exactly_once(length):
    data = pack(TEXTS, length)
    assert data.tokens.shape[1] == length
    predicted = []
    for tokens, weights in zip(data.tokens, data.weights, strict=True):
        for t in range(1, length):
            if weights[t]:
                assert weights[t] == 1
                predicted.append((int(tokens[t - 1]), int(tokens[t])))
    want = [(a, b) for text in TEXTS for a, b in itertools.pairwise(text)]
    assert predicted == want


def test_weights_follow_their_tokens():
    weights = [[token / 10 for token in text] for text in TEXTS]
    for data in (pack(TEXTS, 4, weights), rows(TEXTS, 4, weights)):
        used = data.weights > 0
        np.testing.assert_allclose(
            data.weights[used], data.tokens[used] / 10, rtol=1e-6
        )


def test_rows_cut_and_pad():
    data = rows(TEXTS, 3)
    assert data.tokens.tolist() == [[10, 11, 12], [20, 0, 0], [30, 31, 0], [40, 41, 42]]
    assert data.weights.sum() == 3 + 1 + 2 + 3


def test_batches_show_every_row_once_an_epoch():
    data = Batch(np.arange(14).reshape(7, 2) + 1, np.ones((7, 2)))
    seen = list(batches(data, 3, seed=1, epochs=2))
    assert [b.tokens.shape for b in seen] == [(3, 2)] * 6
    for epoch in (seen[:3], seen[3:]):
        tokens = np.concatenate([b.tokens for b in epoch])
        weights = np.concatenate([b.weights for b in epoch])
        assert sorted(tokens[weights[:, 0] > 0, 0]) == list(range(1, 15, 2))
        assert weights.sum() == 14
    orders = [
        np.concatenate([b.tokens for b in e]).tolist() for e in (seen[:3], seen[3:])
    ]
    assert orders[0] != orders[1]
    again = list(batches(data, 3, seed=1, epochs=2))
    assert all((a.tokens == b.tokens).all() for a, b in zip(seen, again, strict=True))
    other = list(batches(data, 3, seed=2, epochs=2))
    assert any((a.tokens != b.tokens).any() for a, b in zip(seen, other, strict=True))


@pytest.mark.parametrize("f", [pack, rows])
def test_bad_input_is_refused(f):
    with pytest.raises(ValueError, match="length 1"):
        f(TEXTS, 1)
    with pytest.raises(ValueError, match="nothing to predict"):
        f([[1], []], 4)
    with pytest.raises(ValueError, match="one weight a token"):
        f([[1, 2]], 4, [[1.0]])
