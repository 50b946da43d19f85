"""Encoders against golden vectors of torch, and their padding, pools and errors."""

from pathlib import Path

import encoders
import jax
import numpy as np
import pytest

from collab_jax import tree
from collab_jax.io.encoder_names import prefix, rules
from collab_jax.models.encoder import encoder, first_token, init
from collab_jax.models.encoder_config import from_hf

GOLDEN = np.load(Path(__file__).parent / "golden" / "encoder.npz")
BERT = encoders.config("bert")


@pytest.mark.parametrize("name", encoders.CASES)
def test_golden_hidden_states(name):
    made = encoders.config(name)
    tokens, length, types = encoders.texts(made)
    features = jax.jit(encoder(made).features)
    got = features(encoders.params(made), tokens, length, types).hidden
    real = np.arange(tokens.shape[1]) < length[:, None]
    want = GOLDEN[name]
    assert abs(np.asarray(got)[real] - want).max() <= 1e-4 * want.std()
    unmasked = features(
        encoders.params(made), tokens, length * 0 + tokens.shape[1], types
    )
    assert abs(np.asarray(unmasked.hidden)[real] - want).max() > 1e-2 * want.std()


@pytest.mark.parametrize("name", encoders.CASES)
def test_rules_cover_the_tree_and_go_both_ways(name):
    made = encoders.config(name)
    fresh = jax.eval_shape(lambda: init(jax.random.key(0), made))
    params = encoders.params(made)
    assert tree.shapes(params) == tree.shapes(fresh)
    drawn = encoders.tensors(made)
    for rule in rules(made):
        tensors = [drawn[name] for name in rule.names]
        for back, tensor in zip(rule.save(rule.load(tensors)), tensors, strict=True):
            np.testing.assert_array_equal(back, tensor)


def test_a_text_does_not_depend_on_its_batch():
    params, (tokens, length, _) = encoders.params(BERT), encoders.texts(BERT)
    embed = jax.jit(encoder(BERT).embed_sentences)
    together = embed(params, tokens, length)
    for b, size in enumerate(length):
        alone = embed(params, tokens[b : b + 1, :size], length[b : b + 1])
        np.testing.assert_allclose(alone[0], together[b], atol=1e-6)
    np.testing.assert_allclose((together**2).sum(-1), 1, rtol=1e-5)


def test_an_empty_row_gives_no_nan():
    params, (tokens, length, _) = encoders.params(BERT), encoders.texts(BERT)
    got = encoder(BERT).embed_sentences(params, tokens, length * np.array([1, 0, 1]))
    assert np.isfinite(got).all()


def test_the_first_token_as_pool():
    params, (tokens, length, _) = encoders.params(BERT), encoders.texts(BERT)
    made = encoder(BERT, pool=first_token, normalise=False)
    hidden = made.features(params, tokens, length).hidden
    np.testing.assert_allclose(
        made.embed_sentences(params, tokens, length), hidden[:, 0], rtol=1e-6
    )


def test_errors_name_what_was_found():
    hf = encoders.CASES["bert"][0]
    with pytest.raises(ValueError, match="'t5' is not a known encoder"):
        from_hf({**hf, "model_type": "t5"})
    with pytest.raises(ValueError, match="relative_key"):
        from_hf({**hf, "position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="'swish7'"):
        from_hf({**hf, "hidden_act": "swish7"})
    with pytest.raises(ValueError, match="not a multiple"):
        from_hf({**hf, "num_attention_heads": 4})
    with pytest.raises(ValueError, match=r"unknown taps \['hidden.4'\]"):
        encoder(BERT, taps=("hidden.4",))
    with pytest.raises(ValueError, match="18 tokens exceed the 17 positions"):
        encoder(BERT).features(
            encoders.params(BERT), np.zeros((1, 18), np.int32), np.array([18])
        )
    bare = encoders.config("distilbert")
    with pytest.raises(ValueError, match="no pooler"):
        encoder(bare).summary(encoders.params(bare), np.zeros((1, 2, 20)))
    with pytest.raises(ValueError, match="no tensor"):
        prefix(["model.embed_tokens.weight"])
