"""GaC: the mean over a union of vocabularies, its naive twin, laws and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies as voc
from small_tokenizers import bpe, first, second
from test_bridge import WORDS, bytewise, pieces

from collab_jax import combine, pool
from collab_jax.ensemble.vocabulary.lift import borrow, carry
from collab_jax.ensemble.vocabulary.union import union
from collab_jax.io.tokenizer import token_bytes
from collab_jax.io.union import unite
from collab_jax.models import table
from collab_jax.testing import check_lm
from collab_jax.translate import spell, translate

WEIGHTS = (0.3, 0.7)
LM = union(voc.LMS, voc.BRIDGES, *WEIGHTS, ratio=3.0)


def naive(found, weights=WEIGHTS, words=voc.WORDS, every=voc.UNION, last=False):
    """The mean, word by word; `last`: of words that mean the same the last counts."""
    result = np.zeros((len(found), len(every)))
    for t, row in enumerate(found):
        for w, z, some in zip(weights, row, words, strict=True):
            law = np.zeros(len(every))
            for u, p in enumerate(voc.softmax(z)):
                at = every.index(some[u])
                law[at] = p if last else law[at] + p
            result[t] += w * law
    return result


def test_the_law_is_the_naive_one():
    found = voc.laws(LM, voc.PARAMS)
    rows = voc.readings(voc.TEXT)
    np.testing.assert_allclose(found, naive(rows), atol=1e-6)
    wrong = naive(rows, last=True)
    assert abs(found - wrong).max() > 0.01
    assert abs(found - naive(rows, (0.5, 0.5))).max() > 0.05
    # the bridge's own law gives the second of two equal words to nobody
    parts = zip(voc.LMS, voc.BRIDGES, strict=True)
    one = [translate(lm, bridge, 3.0) for lm, bridge in parts]
    lost = voc.laws(combine.product(one, pool.mixture(*WEIGHTS)), voc.PARAMS)
    assert abs(found - lost).max() > 0.01


def test_the_law_of_transformers_is_the_naive_one():
    lms, params = zip(*voc.SMALL, strict=True)
    model = union(lms, voc.BRIDGES, *WEIGHTS, ratio=3.0)
    found = voc.laws(model, params, voc.TEXT[:5])
    rows = voc.model_readings(voc.TEXT[:5])
    np.testing.assert_allclose(found, naive(rows), atol=1e-5)


def test_laws():
    check_lm(LM, voc.PARAMS, voc.V, tolerance=1e-6, jit=True)


@pytest.mark.slow
def test_laws_of_transformers():
    lms, params = zip(*voc.SMALL, strict=True)
    check_lm(union(lms, voc.BRIDGES, ratio=3.0), params, voc.V, jit=True)


@pytest.mark.slow
def test_the_laws_need_no_jit():
    check_lm(LM, voc.PARAMS, voc.V, tolerance=1e-6, jit=False)


def test_greedy_text_is_the_same_under_speculation():
    voc.check_speculates(LM, voc.PARAMS)


def test_weights_are_swept_and_differentiated_in_one_trace():
    traces = []

    @jax.jit
    def nats(weight, bridges):
        traces.append(None)
        model = union(voc.LMS, bridges, weight, 1 - weight, ratio=3.0)
        text = jnp.array([voc.TEXT])
        out, _ = model.extend(voc.PARAMS, model.init(voc.PARAMS, *text.shape), text)
        log_p = jax.nn.log_softmax(out.logits[0, :-1])
        return -jnp.take_along_axis(log_p, text[0, 1:, None], 1).mean()

    values = [float(nats(w, voc.BRIDGES)) for w in (0.1, 0.499, 0.501, 0.9)]
    assert len(traces) == 1
    slope = float(jax.grad(nats)(0.5, voc.BRIDGES))
    assert slope == pytest.approx((values[2] - values[1]) / 0.002, rel=0.02)
    many = jax.vmap(lambda w: nats(w, voc.BRIDGES))(jnp.array([0.1, 0.9]))
    np.testing.assert_allclose(many, [values[0], values[3]], rtol=1e-5)


def test_a_model_with_itself_is_plain_averaging():
    """Also where the other copy has its tokens in another order."""
    tokenizer = bytewise()
    vocab = len(tokenizer)
    lms = table.language_model(2), table.language_model(1)
    params = tuple(
        table.init(jax.random.key(n), vocab, 2 - n, scale=2.0) for n in range(2)
    )
    both = unite(tokenizer, tokenizer)
    text = [0, 7, 2, 3, 5, 1, 8, 6]
    plain = voc.laws(combine.product(lms, pool.mixture(*WEIGHTS)), params, text)
    found = voc.laws(union(lms, both.bridges, *WEIGHTS), params, text)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    order = np.random.default_rng(0).permutation(vocab)
    home = jnp.asarray(order, jnp.int32)  # token u of the copy is token order[u]
    back = jnp.argsort(home).astype(jnp.int32)
    identity = both.bridges[0]
    renamed = identity._replace(spelling=back[:, None], pivot=home)
    moved = params[1].reshape(vocab + 1, vocab)[jnp.append(home, vocab)][:, home]
    bridges = identity, renamed
    found = voc.laws(union(lms, bridges, *WEIGHTS), (params[0], moved), text)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    wrong = voc.laws(union(lms, bridges, *WEIGHTS), params, text)
    assert abs(wrong - plain).max() > 0.05


def test_a_union_of_tokenizers():
    ours, theirs = bytewise(), pieces()
    both = unite(ours, theirs, fallbacks=(0, 0))
    names = ours.convert_ids_to_tokens(range(9))
    assert list(both.names[:9]) == names
    # a byte by its number is the byte; a space is a space; the ends of text are twins
    assert both.names[9:] == ("▁a", "<unk>", "<s>")
    assert both.tokens[9] == b" a"
    home = both.bridges[1].pivot.tolist()
    told = {word: both.names[v] for word, v in zip(WORDS, home, strict=True)}
    assert told == {
        "<unk>": "<unk>", "<s>": "<s>", "</s>": "<end>", "<0x61>": "a", "<0xC3>": "Ã",
        "<0xA9>": "©", "a": "a", "▁": "Ġ", "▁a": "▁a", "b": "b",
    }  # fmt: skip
    assert both.bridges[0].pivot.tolist() == [*range(9)]
    for n, tokenizer in enumerate((ours, theirs)):
        content = token_bytes(tokenizer)
        for v, text in enumerate(both.tokens):
            if text:
                read = spell(both.bridges[n], [v])
                assert b"".join(content[u] for u in read) == text
    assert spell(both.bridges[1], [1]) == [WORDS.index("a")]  # not by its number
    assert both.text([9, 4, 8]) == " ab"


def test_three_tokenizers_and_rows_beyond_them():
    made = first(), second(), bpe(["a", "b", "c", "d", "x", "hello"])
    every = unite(*made, vocabs=(9, None, 8), fallbacks=(0, 0, 0))
    assert [b.size.shape[0] for b in every.bridges] == [len(every.tokens)] * 3
    # 0-6 are the first's, 7 and 8 rows without a token
    assert every.names[7:] == ("", "", "d", "cd", "ba", "hello", "<pad>")
    assert every.bridges[1].pivot.tolist() == [1, 0, 3, 9, 10, 11, 12, 13, 6]
    assert every.bridges[2].pivot.tolist() == [0, 1, 3, 9, 4, 12, -1, -1]
    assert spell(every.bridges[2], [11, 12, 7]) == [1, 0, 5, 0]
    assert every.bridges[0].pivot.tolist() == [*range(7), -1, -1]


def test_mass_without_a_home_is_dropped():
    """Bridges from the first member's vocabulary alone: the rest is renormalised."""
    bridges = [voc.bridge(voc.WORDS[0], words) for words in voc.WORDS]
    text = [voc.WORDS[0].index(w) for w in ("ab", "c", "a", "b", "ab")]
    found = voc.laws(union(voc.LMS, bridges, *WEIGHTS, ratio=3.0), voc.PARAMS, text)
    rows = voc.readings(text, every=voc.WORDS[0])
    for t, (own, other) in enumerate(rows):
        kept = np.zeros(4)
        for u, p in enumerate(voc.softmax(other)):
            if voc.WORDS[1][u] in voc.WORDS[0]:
                kept[voc.WORDS[0].index(voc.WORDS[1][u])] += p
        expected = WEIGHTS[0] * voc.softmax(own) + WEIGHTS[1] * kept / kept.sum()
        np.testing.assert_allclose(found[t], expected, atol=1e-6)


def test_lifts_and_what_is_forbidden():
    home = jnp.array([1, 1, 0, -1])
    z = jnp.array([[-jnp.inf, 0.0, -200.0, 1.0], [-jnp.inf, -jnp.inf, 0.0, 0.0]])
    lifted = carry(home, 3)(z)
    log_p = jax.nn.log_softmax(z)
    np.testing.assert_allclose(lifted[0, :2], [log_p[0, 2], log_p[0, 1]], rtol=1e-6)
    assert lifted[:, 2].tolist() == [-np.inf] * 2
    assert lifted[1, 1] == -np.inf
    dead = carry(home, 3)(jnp.full(4, -jnp.inf))
    assert bool(jnp.isneginf(dead).all())
    lost = carry(home, 3)(jnp.array([0.0, jnp.nan, 0.0, 0.0]))
    assert bool(jnp.isnan(lost[:2]).all())
    slope = jax.grad(lambda z: carry(home, 3)(z)[1])(z[0])
    assert np.isfinite(slope).all()
    assert borrow(jnp.array([2, -1, 2]), 4)(z[0]).tolist() == [-200, -np.inf, -200]
    for lift in (carry(home, 3), borrow(home, 4)):
        with pytest.raises(ValueError, match="over 5 tokens for a map from 4"):
            lift(jnp.zeros(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: union(voc.LMS, voc.BRIDGES[:1]), "1 bridges for 2 members"),
        (lambda: union(voc.LMS, voc.BRIDGES, 0.5, -1), "weight of -1"),
        (lambda: union(voc.LMS, voc.BRIDGES, ratio=0), "ratio = 0"),
        (
            lambda: union(
                voc.LMS, [voc.BRIDGES[0], voc.bridge(["a", "b"], voc.WORDS[1])]
            ),
            r"vocabularies of \[6, 2\] tokens",
        ),
        (lambda: unite(first()), "a union of 1 tokenizers"),
        (lambda: unite(first(), second()), r"tokens of tokenizer 0, such as 'd'"),
        (lambda: unite(first(), second(), vocabs=[3]), "1 vocabs for 2"),
        (lambda: unite(first(), second(), twins={"<s>": "no"}), "no special token"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_that_do_not_fit_are_refused():
    model = union(voc.LMS, voc.BRIDGES, 0.5, ratio=3.0)
    with pytest.raises(ValueError, match="1 weights for 2 members"):
        model.extend(voc.PARAMS, model.init(voc.PARAMS, 1, 4), jnp.array([[0]]))
