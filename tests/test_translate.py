"""An LM over another vocabulary: its laws, its naive twin, and how it overflows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import combine, decode, lm, pool, translate, warp
from collab_jax.models import table
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer
from collab_jax.testing import check_lm
from collab_jax.translate import from_spellings, opened, spell, spelling_cost

# pivot: a b ab c bb bac; member: c a b ba
SPELLINGS = [[1], [2], [1, 2], [0], [2, 2], [2, 1, 0]]
BRIDGE = from_spellings(SPELLINGS, vocab=4)
VOCAB, MEMBER = len(SPELLINGS), 4
TABLE = table.language_model(3)
PARAMS = table.init(jax.random.key(0), MEMBER, 3, scale=2.0)
LM = translate.translate(TABLE, BRIDGE, ratio=3.0)


def warped():
    """Warps of the member, which counts its own tokens, and of the whole."""
    member = warp.warp(opened(TABLE, [3, 0]), warp.frequency_penalty(0.3))
    whole = translate.translate(member, BRIDGE, ratio=3.0)
    return warp.warp(whole, warp.repetition_penalty(1.3), warp.top_p(0.9)), PARAMS


def mixed():
    other = table.language_model(1)
    own = table.init(jax.random.key(1), VOCAB, 1)
    return combine.product([LM, other], pool.mixture()), (PARAMS, own)


def twice():
    """Through a vocabulary in between: pairs of tokens."""
    pairs = from_spellings([[0], [1], [2, 5], [5], [3, 4]], vocab=VOCAB)
    return translate.translate(LM, pairs, ratio=2.0), PARAMS


ZOO = {
    "no room": lambda: (translate.translate(TABLE, BRIDGE, ratio=0.4), PARAMS),
    "warped": warped,
    "mixed": mixed,
    "twice": twice,
}
SLOW = ("warped", "mixed", "twice")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ZOO]
)
def test_laws(name):
    model, params = ZOO[name]()
    vocab = 5 if name == "twice" else VOCAB
    check_lm(model, params, vocab, tolerance=1e-6, jit=True)


@pytest.mark.slow
def test_the_laws_need_no_jit():
    check_lm(LM, PARAMS, VOCAB, tolerance=0, jit=False)


def test_pieces_of_a_call_change_nothing(monkeypatch):
    monkeypatch.setattr(translate, "WIDTH", 3)
    check_lm(LM, PARAMS, VOCAB, tolerance=0, jit=True)


CONFIG = from_hf(
    {
        "model_type": "gemma3_text",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    }
)


def many(seed=0, vocab=61, member=40):
    """Random spellings; a third of the pivot's tokens are one of the member's."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(member)
    return [
        [int(order[v])]
        if v < vocab // 3
        else rng.integers(0, member, rng.integers(2, 6)).tolist()
        for v in range(vocab)
    ]


def test_a_transformer_obeys_the_laws():
    member = lm.language_model(transformer(CONFIG))
    params = init(jax.random.key(0), CONFIG)
    model = translate.translate(member, from_spellings(many(), 40), ratio=5.0)
    check_lm(model, params, 61, jit=True)


def naive(spellings, shared, text):
    """Law behind every token of a text: spell, read, restrict, renormalise."""
    found, own = [], []
    whole = [u for v in text for u in spellings[v]]
    out, _ = read(TABLE, 20, jnp.array([whole]))
    for token in text:
        own += spellings[token]
        q = np.exp(np.float64(out.logits[0, len(own) - 1]))
        p = np.array([q[spellings[v][0]] if v in shared else 0.0 for v in range(VOCAB)])
        found.append(p / p.sum())
    return np.array(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(model, capacity, tokens):
    """What a model says of a text, and its state."""
    return model.extend(PARAMS, model.init(PARAMS, len(tokens), capacity), tokens)


def test_the_law_is_the_naive_one():
    text = [2, 5, 1, 4, 3, 0, 2, 2]
    out, _ = read(LM, 8, jnp.array([text]))
    found = np.asarray(jax.nn.softmax(out.logits[0]))
    np.testing.assert_allclose(found, naive(SPELLINGS, {0, 1, 3}, text), atol=1e-6)
    backwards = [s[::-1] for s in SPELLINGS]
    assert abs(found - naive(backwards, {0, 1, 3}, text)).max() > 0.1
    whole = naive(SPELLINGS, {0, 1, 2, 3, 4}, text)  # a first piece is not the token
    assert abs(found - whole).max() > 0.1


def test_of_tokens_that_mean_the_same_one_is_drawn():
    one = from_spellings([[1], [1], [0]], vocab=2)
    assert one.shared().tolist() == [True, False, True]
    other = from_spellings([[1], [1], [0]], vocab=2, aliases=[0])
    assert other.shared().tolist() == [False, True, True]


def test_an_overflow_is_not_a_number_until_it_is_taken_back():
    model = translate.translate(TABLE, BRIDGE, ratio=1.0)
    text = jnp.array([[5, 5, 0, 1], [0, 0, 0, 1]])
    out, state = read(model, 6, text)
    dead = jnp.isnan(out.logits).any(-1)
    assert dead.tolist() == [[False, False, True, True], [False] * 4]
    state = model.rewind(state, jnp.array([3, 0]))
    out, _ = jax.jit(model.extend)(PARAMS, state, text[:, 2:3])
    roomy, _ = read(LM, 6, jnp.array([[5, 0]]))
    np.testing.assert_array_equal(out.logits[0, 0], roomy.logits[0, 1])


def test_a_run_that_overflows_raises():
    """The member can only say c, which the pivot spells with three."""
    bridge = from_spellings([[0, 0, 0], [1]], vocab=2)
    model = translate.translate(table.language_model(0), bridge, ratio=1.0)
    start, length = decode.pad([[0, 0, 0, 1]])
    with pytest.raises(FloatingPointError, match="ratio"):
        decode.run(
            decode.sample(model, 4), jnp.zeros((1, 2)), start, length, jax.random.key(0)
        )


def test_the_text_may_begin_before_the_prompt():
    model = translate.translate(opened(TABLE, [3, 3, 1]), BRIDGE)
    out, _ = read(model, 2, jnp.array([[2]]))
    expected, _ = read(TABLE, 8, jnp.array([[3, 3, 1, 1, 2]]))
    np.testing.assert_array_equal(out.logits[0, 0, :2], expected.logits[0, -1, 1:3])
    with pytest.raises(ValueError, match="no tokens"):
        opened(TABLE, [])


def test_the_cost_of_spelling_is_in_nats():
    tokens, own = [2, 1, 5], [1, 2, 2, 3, 0]  # ab b bac, and a b b ba c
    assert spell(BRIDGE, tokens) == [1, 2, 2, 2, 1, 0]
    first, second = spelling_cost(TABLE, PARAMS, BRIDGE, tokens, own)
    for text, found in ((own, first), (spell(BRIDGE, tokens), second)):
        out, _ = read(TABLE, 8, jnp.array([text]))
        log_p = np.asarray(jax.nn.log_softmax(out.logits[0]))
        nats = -sum(log_p[i, text[i + 1]] for i in range(len(text) - 1))
        assert found == pytest.approx(nats, rel=1e-5)
    with pytest.raises(ValueError, match="1 member tokens"):
        spelling_cost(TABLE, PARAMS, BRIDGE, [0], [1])


def test_a_call_is_traced_once():
    traces = []

    def seen(params, bridge, tokens):
        traces.append(None)
        model = translate.translate(TABLE, bridge)
        return model.extend(params, model.init(params, 1, 4), tokens)[0].logits

    program = jax.jit(seen)
    other = from_spellings([[1], [0], [1, 2], [2], [2, 2], [2, 1, 0]], vocab=4)
    one = program(PARAMS, BRIDGE, jnp.array([[0, 2]]))
    two = program(PARAMS, other, jnp.array([[0, 2]]))
    assert len(traces) == 1
    assert not (one == two).all()


@pytest.mark.parametrize(
    ("spellings", "vocab", "message"),
    [
        ([[0], []], 2, "token 1 has none"),
        ([], 2, "none is given"),
        ([[0], [1, 7]], 2, r"token 1 is spelled \[1, 7\]: .* 0 to 1"),
        ([[0, 1], [1, 1]], 2, "no token of 2 is one of the member's 2"),
    ],
)
def test_what_is_no_bridge_is_refused(spellings, vocab, message):
    with pytest.raises(ValueError, match=message):
        from_spellings(spellings, vocab)


def test_another_model_is_refused():
    params = table.init(jax.random.key(0), 5, 3)
    state = LM.init(params, 1, 2)
    with pytest.raises(ValueError, match="4 tokens and the LM has 5"):
        LM.extend(params, state, jnp.array([[0]]))
    with pytest.raises(ValueError, match="ratio = 0"):
        translate.translate(TABLE, BRIDGE, 0)
