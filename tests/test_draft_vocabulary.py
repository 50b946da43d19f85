"""Drafts from a part of the vocabulary: the same text, fewer columns."""

import functools

import features as small
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from speculation import draws, new_tokens

from collab_jax import decode, finetune, warp
from collab_jax.cooperate.efficient import exact, feature_training, growth, tree
from collab_jax.cooperate.efficient import parallel_training as pt
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.parallel import (
    parallel,
    parallel_sampled,
    parallel_tree,
)
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import draft_vocabulary as dv
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.parallel_heads import Heads, medusa, narrowed, separate

BACKBONE, BASE, MODEL = small.BACKBONE, small.BASE, small.MODEL
V = small.VOCAB
PROMPTS = small.PROMPTS
EVERY = dv.draft_vocabulary(range(V), V)


@functools.cache
def greedy_text():
    found = draws(decode.greedy(MODEL, 16), BASE, PROMPTS)
    return [new_tokens(found, row) for row in range(len(PROMPTS))]


@functools.cache
def few():
    """Half of what the model writes here."""
    seen = sorted({token for text in greedy_text() for token in text})
    return dv.draft_vocabulary(seen[::2] + [V - 1] * (V - 1 not in seen[::2]), V)


def random(params):
    """No parameter of a new head is 0."""
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(form, noise)


def heads_over(vocabulary) -> tuple[Heads, dict]:
    heads = medusa(BACKBONE, 3, output=narrowed(vocabulary))
    return heads, random(heads.init(jax.random.key(1), BASE))


def written():
    """Rows of the model's text."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (2, 12)).astype(np.int32)
    weights = (rng.uniform(size=(2, 12)) + 0.5).astype(np.float32)
    return small.Batch(tokens, weights)


def one_program(function, model, own, **rest):
    """`function(BACKBONE, model, own, BASE, BATCH, **rest)`, jitted."""
    run = jax.jit(lambda own, base: function(BACKBONE, model, own, base, BATCH, **rest))
    return run(own, BASE)


BATCH = written()


def test_new_heads_are_columns_of_the_model():
    vocabulary = dv.draft_vocabulary([7, 0, 5], V)
    heads = medusa(BACKBONE, 2, output=narrowed(vocabulary))
    whole = medusa(BACKBONE, 2, output=separate)
    h = jax.random.normal(jax.random.key(0), (3, small.WIDTH))
    own = heads.init(jax.random.key(1), BASE)
    every = whole.apply(whole.init(jax.random.key(1), BASE), BASE, h)
    found = heads.apply(own, BASE, h)
    assert found.shape == (3, 2, 3)
    np.testing.assert_allclose(found, every[..., np.array([0, 5, 7])], atol=1e-5)
    np.testing.assert_allclose(every[:, 0], BACKBONE.unembed(BASE, h[None])[0], 1e-4)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_greedy_text_is_that_of_plain_decoding(shape):
    """Though the text holds tokens that are never drafted."""
    vocabulary = few()
    heads = medusa(BACKBONE, 3, output=narrowed(vocabulary))
    own = heads.init(jax.random.key(1), BASE)
    proposer, verifier = parallel(heads), exact.greedy()
    if shape == "tree":
        paths = [(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]
        proposer, verifier = parallel_tree(heads, paths), tree.sampled()
    target = on_lm(warp.warp(MODEL, warp.greedy()))
    decoder = speculate(target, proposer, 16, verifier=verifier)
    found = draws(decoder, (BASE, (own, BASE)), PROMPTS)
    for row, text in enumerate(greedy_text()):
        assert new_tokens(found, row) == text
    assert found.info.drafted.sum() > 0
    assert not set(np.concatenate(greedy_text()).tolist()) <= set(vocabulary.tokens)


def test_the_law_of_a_draft_is_wide():
    """What is not listed has probability 0, and the rest the law of the heads."""
    vocabulary = few()
    heads, own = heads_over(vocabulary)
    proposer = parallel_sampled(heads, warp.temperature(0.5))
    text, length = decode.pad([[1, 2, 3]])
    state = proposer.init((own, BASE), text, length, 8)
    hidden = jax.random.normal(jax.random.key(3), state.hidden.shape)
    state = state._replace(hidden=hidden, known=jnp.array([True]))
    key = jax.random.split(jax.random.key(4), 1)
    draft, _ = proposer.propose((own, BASE), state, text, length, key)
    logits = heads.apply(own, BASE, hidden) / 0.5
    listed = np.array(vocabulary.tokens)
    best, _ = parallel(heads).propose((own, BASE), state, text, length, key)
    assert best.tokens[0].tolist() == listed[np.argmax(logits[0], axis=-1)].tolist()
    np.testing.assert_allclose(draft.law[..., listed], logits, rtol=1e-6)
    others = np.setdiff1d(np.arange(V), listed)
    assert np.isneginf(draft.law[..., others]).all()
    assert set(np.ravel(draft.tokens).tolist()) <= set(vocabulary.tokens)


def test_all_tokens_are_no_restriction():
    """The loss and the accuracies of heads with a matrix for all tokens."""
    heads, own = heads_over(EVERY)
    whole = medusa(BACKBONE, 3, output=separate)
    for function in pt.heads_loss, pt.accuracies:
        found = one_program(function, heads, own)
        want = one_program(function, whole, own)
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_tokens_that_are_not_drafted_do_not_count():
    """The loss of heads is that of the other tokens; they have no rank."""
    vocabulary = dv.draft_vocabulary(range(0, V, 2), V)
    heads, own = heads_over(vocabulary)
    targets, weights = pt._ahead(BATCH, 3)

    @jax.jit
    def read(own, base):
        x = BACKBONE.embed(base, BATCH.tokens[:, :-1])
        hidden = BACKBONE.features(base, None, x)[0].hidden
        return heads.apply(own, base, hidden)

    logits = np.float64(read(own, BASE))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    listed = list(vocabulary.tokens)
    total, whole, every, first = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    for place in np.ndindex(targets.shape):
        token, weight, i = int(targets[place]), float(weights[place]), place[-1]
        every[i] += weight
        if token in listed:
            total[i] -= weight * log_p[place][listed.index(token)]
            whole[i] += weight
            first[i] += weight * (log_p[place].argmax() == listed.index(token))
    want = (total / whole * 0.8 ** np.arange(1, 4)).sum()
    found = one_program(pt.heads_loss, heads, own, chunk=4)
    assert float(found) == pytest.approx(want, rel=1e-5)
    assert (whole < every).all()
    shares = one_program(pt.accuracies, heads, own, ranks=len(listed))
    np.testing.assert_allclose(shares[:, 0], first / every, atol=1e-6)
    np.testing.assert_allclose(shares.sum(1), whole / every, rtol=1e-5)


def test_a_feature_layer_over_all_tokens_is_the_plain_one():
    layer, plain = extrapolator(small.CONFIG, vocabulary=EVERY), small.LAYER
    own = layer.init(jax.random.key(1), BASE)
    assert own["head"]["kernel"].shape == (small.WIDTH, V)
    bare = {name: leaf for name, leaf in own.items() if name != "head"}
    arguments = {"steps": 2, "law_weight": 0.7}
    loss = feature_training.extrapolation_loss
    found = one_program(loss, layer, own, **arguments)
    want = one_program(loss, plain, bare, **arguments)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for ranks in 1, 4:
        shares = [
            one_program(feature_training.accuracies, *one, steps=2, ranks=ranks)
            for one in ((layer, own), (plain, bare))
        ]
        np.testing.assert_allclose(*shares, atol=1e-6)


def test_a_feature_layer_learns_what_it_drafts():
    """Its loss is the conditional law's where the best token is drafted."""
    vocabulary = dv.draft_vocabulary(range(0, V, 2), V)
    layer = extrapolator(small.CONFIG, vocabulary=vocabulary)
    own = random(layer.init(jax.random.key(1), BASE))
    loss = feature_training.extrapolation_loss
    found = one_program(loss, layer, own, feature_weight=0.0, law_weight=1.0, chunk=4)
    rest = {"steps": 1, "noise": 0.0, "key": None}
    guesses, hidden, _ = one_program(feature_training._guesses, layer, own, **rest)
    laws = np.float64(BACKBONE.unembed(BASE, hidden))
    z = np.float64(layer.unembed(own, BASE, guesses[:, :, 0]))
    listed, weights = np.array(vocabulary.tokens), BATCH.weights[:, 1:]
    p = np.exp(laws[..., listed])
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    cross = -(p / p.sum(-1, keepdims=True) * log_q).sum(-1)
    counts = np.isin(laws.argmax(-1), listed)
    assert 0 < counts.sum() < counts.size
    want = (weights * cross * counts).sum() / weights.sum()
    assert float(found) == pytest.approx(want, rel=1e-5)

    gradient = one_program(jax.grad(loss, argnums=2), layer, own)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("grown", [growth.chain(3), growth.expanded(3, 2, 6)])
def test_a_feature_drafter_drafts_from_the_list(grown):
    vocabulary = few()
    layer = extrapolator(small.CONFIG, vocabulary=vocabulary)
    own = layer.init(jax.random.key(1), BASE)
    proposer = feature_drafter(BACKBONE, layer, grown)
    verifier = exact.greedy()
    target = on_lm(MODEL)
    decoder = speculate(target, proposer, 16, verifier=verifier)
    found = draws(decoder, (BASE, (own, BASE)), PROMPTS)
    for row, text in enumerate(greedy_text()):
        assert new_tokens(found, row) == text


def test_training_reaches_the_output_matrix():
    heads, own = heads_over(few())
    tuner = pt.heads_tuner(BACKBONE, heads, optax.adam(1e-2))
    run = {"base": BASE, "batch_size": 2, "epochs": 6, "progress": False}
    after, history = finetune.fit(tuner, own, BATCH, **run)
    assert history[-1] < history[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), own, after)
    assert all(jax.tree.leaves(moved))


def test_frequent_tokens():
    texts = [[5, 5, 2, 9], [2, 5, 7]]
    assert dv.frequent(texts, 2, 10).tokens == (2, 5)
    assert dv.frequent(texts, 3, 10).tokens == (2, 5, 7)
    assert dv.frequent(texts, 3, 10, always=[0]).tokens == (0, 2, 5)
    assert dv.frequent(texts, 6, 10).tokens == (0, 1, 2, 5, 7, 9)
    assert dv.frequent([], 10, 10).tokens == tuple(range(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dv.draft_vocabulary([], 4), "of no tokens"),
        (lambda: dv.draft_vocabulary([1, 1], 4), "token 1 stands twice"),
        (lambda: dv.draft_vocabulary([4], 4), "token 4 .* 0 to 3 are expected"),
        (lambda: dv.draft_vocabulary([-1], 4), "token -1 "),
        (lambda: dv.frequent([[1]], 0, 4), "count = 0"),
        (lambda: dv.frequent([[1]], 5, 4), "at most the 4 of the model"),
        (lambda: dv.frequent([[1]], 1, 4, [0, 2]), "the 2 of `always`"),
    ],
)
def test_what_is_no_draft_vocabulary(make, message):
    with pytest.raises(ValueError, match=message):
        make()
