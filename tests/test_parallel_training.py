"""Training of parallel heads: the loss against loops, and more tokens a call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from speculation import draws, new_tokens

from collab_jax import decode, finetune, lm, warp
from collab_jax.cooperate.efficient import parallel_training as pt
from collab_jax.cooperate.efficient import tree
from collab_jax.cooperate.efficient.parallel import parallel, parallel_tree
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.cooperate.efficient.topology import grow
from collab_jax.finetune import finetuner, fit
from collab_jax.io.checkpoint import load_checkpoint, save_checkpoint
from collab_jax.models import transformer
from collab_jax.models.config import from_hf
from collab_jax.models.parallel_heads import medusa
from collab_jax.packing import Batch, pack

VOCAB = 13
CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
)
BACKBONE = transformer.transformer(CONFIG)
BASE = transformer.init(jax.random.key(0), CONFIG)
HEADS = medusa(BACKBONE, 3)
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, VOCAB, (3, 9)).astype(np.int32),
    RNG.uniform(0.5, 1, (3, 9)).astype(np.float32) * (RNG.uniform(size=(3, 9)) > 0.15),
)


@functools.cache
def random_heads():
    params = HEADS.init(jax.random.key(1), BASE)
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        0.5 * jax.random.normal(key, x.shape)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(form, noise)


def predictions(batch, ahead=1):
    """Yields (row, token that the state belongs to, head, token to be said, weight)."""
    for row, weights in enumerate(batch.weights):
        for t in range(len(weights)):
            for i in (1, 2, 3):
                place = t + ahead + i
                whole = place < len(weights) and (weights[t + 1 : place] > 0).all()
                if whole:
                    yield row, t, i, int(batch.tokens[row, place]), weights[place]


def naive_logits(batch):
    """`[B, T, K, V]`, of the whole text at once."""
    x = BACKBONE.embed(BASE, batch.tokens)
    hidden = BACKBONE.features(BASE, None, x)[0].hidden
    return np.float64(HEADS.apply(random_heads(), BASE, hidden))


def naive_loss(batch, decay, ahead=1):
    total, whole = np.zeros(3), np.zeros(3)
    logits = naive_logits(batch)
    for row, t, i, token, weight in predictions(batch, ahead):
        law = np.exp(logits[row, t, i - 1])
        total[i - 1] -= weight * np.log(law[token] / law.sum())
        whole[i - 1] += weight
    return (total / whole * decay ** np.arange(1, 4)).sum()


@functools.partial(jax.jit, static_argnums=(2, 3))
def heads_loss(params, batch, decay=0.8, chunk=32):
    return pt.heads_loss(BACKBONE, HEADS, params, BASE, batch, decay, chunk)


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_loss_is_the_weighted_mean_over_single_predictions(chunk):
    got = float(heads_loss(random_heads(), BATCH, 0.7, chunk))
    assert got == pytest.approx(naive_loss(BATCH, 0.7), rel=1e-5)
    assert got != pytest.approx(naive_loss(BATCH, 0.7, ahead=0), rel=1e-2)


def test_no_prediction_reaches_into_another_text():
    """What is not learned may stand in a gap of two texts, or in a prompt."""
    batch = pack([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], 10)
    states = [(t, i) for _, t, i, _, weight in predictions(batch) if weight]
    assert max(t + 1 + i for t, i in states if t < 5) == 4
    got = float(heads_loss(random_heads(), batch))
    assert got == pytest.approx(naive_loss(batch, 0.8), rel=1e-5)
    with pytest.raises(ValueError, match="rows of 4 tokens for 3 heads: at least 5"):
        heads_loss(random_heads(), Batch(BATCH.tokens[:, :4], BATCH.weights[:, :4]))
    nothing = Batch(BATCH.tokens, BATCH.weights * 0)
    assert float(heads_loss(random_heads(), nothing)) == 0


def test_the_model_is_frozen_unless_both_are_trained():
    def alone(both):
        return pt.heads_loss(BACKBONE, HEADS, *both, BATCH)

    def joint(both):
        return pt.joint_loss(BACKBONE, HEADS, both, BATCH, weight=0.3)

    @jax.jit
    def gradients(both):
        plain = finetune.loss(BACKBONE, both[1], BATCH)
        heads, joined = (jax.value_and_grad(f)(both) for f in (alone, joint))
        return plain, heads, joined

    both = random_heads(), BASE
    plain, (heads, (own, frozen)), (joined, free) = gradients(both)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(frozen))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves((own, free)))
    np.testing.assert_allclose(joined, plain + 0.3 * heads, rtol=1e-5)


def test_accuracies_against_loops():
    hits, whole = np.zeros((3, 4)), np.zeros((3, 1))
    logits = naive_logits(BATCH)
    for row, t, i, token, weight in predictions(BATCH):
        order = np.argsort(-logits[row, t, i - 1], kind="stable").tolist()
        if order.index(token) < 4:
            hits[i - 1, order.index(token)] += weight
        whole[i - 1] += weight
    found = pt.accuracies(BACKBONE, HEADS, random_heads(), BASE, BATCH, 4, chunk=3)
    np.testing.assert_allclose(found, hits / whole, rtol=1e-5)
    assert hits[:, 0].sum() > 0


def sentences(seed, count):
    """Text in which two of three tokens are certain: a, a + 4, a + 7, and a moves."""
    rng = np.random.default_rng(seed)
    a, text = 0, []
    for _ in range(count):
        a = (a + rng.choice([1, 5], p=[0.8, 0.2])) % VOCAB
        text += [int(a), int(a + 4) % VOCAB, int(a + 7) % VOCAB]
    return text


@functools.cache
def trained():
    """(model, heads, their loss before and behind) after a few seconds."""
    data = pack([sentences(0, 600)], 31)
    run = {"batch_size": 10, "progress": False}
    tuner = finetuner(BACKBONE, optax.adam(2e-2))
    base, _ = fit(tuner, BASE, data, epochs=50, **run)
    before = jax.tree.map(np.array, base)
    params = HEADS.init(jax.random.key(1), base)
    tuner = pt.heads_tuner(BACKBONE, HEADS, optax.adam(3e-2))
    own, history = fit(tuner, params, data, base=base, epochs=40, **run)
    jax.tree.map(np.testing.assert_array_equal, before, base)
    return base, own, history


PROMPTS = [[1, 5, 8], [0, 4, 7, 1, 5, 8, 2], [9, 0]]


@functools.cache
def rounds(paths=None):
    target = on_lm(warp.warp(lm.language_model(BACKBONE), warp.greedy()))
    proposer, verifier = parallel(HEADS), None
    if paths is not None:
        proposer, verifier = parallel_tree(HEADS, paths), tree.sampled()
    return decode.compile(lambda _: speculate(target, proposer, 48, verifier=verifier))


def tokens_a_call(base, own, paths=None):
    """On greedy text, which is checked on the way."""
    params = base, (own, base)
    found = rounds(paths)(None, params, *decode.pad(PROMPTS), jax.random.key(0))
    for row, text in enumerate(greedy_text()):
        assert new_tokens(found, row) == text
    return 3 * 48 / int(found.info.calls.sum())


@functools.cache
def greedy_text():
    model = lm.language_model(BACKBONE)
    found = draws(decode.greedy(model, 48), trained()[0], PROMPTS)
    return [new_tokens(found, row) for row in range(3)]


def test_trained_heads_are_right_more_often():
    """And a head in the place of its neighbour is not: each knows its own token."""
    base, own, history = trained()
    assert np.mean(history[-5:]) < 0.7 * np.mean(history[:5])
    new = tokens_a_call(base, HEADS.init(jax.random.key(1), base))
    good = tokens_a_call(base, own)
    assert good > 1.5 * new
    assert good > 2
    rolled = {f"head_{i}": own[f"head_{i % 3 + 1}"] for i in (1, 2, 3)}
    assert tokens_a_call(base, rolled) < 0.7 * good


def test_a_tree_of_the_measured_shares_accepts_no_less():
    base, own, _ = trained()
    text = pack([sentences(1, 100)], 31)
    shares = pt.accuracies(BACKBONE, HEADS, own, base, text, ranks=4)
    assert shares.shape == (3, 4)
    assert shares[0, 0] > 0.5
    paths = grow(8, np.asarray(shares))
    assert len(paths) == 8
    assert tokens_a_call(base, own, paths) >= tokens_a_call(base, own)


def test_heads_are_a_plain_tree_on_disk(tmp_path):
    own = random_heads()
    save_checkpoint(tmp_path / "heads", own)
    found = load_checkpoint(tmp_path / "heads")
    assert sorted(found) == ["head_1", "head_2", "head_3"]
    jax.tree.map(np.testing.assert_array_equal, found, own)
    same = jnp.ones((1, 16))
    np.testing.assert_array_equal(
        HEADS.apply(found, BASE, same), HEADS.apply(own, BASE, same)
    )
