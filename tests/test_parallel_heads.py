"""Parallel heads in the loop: which token a head speaks of, and the text's law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import speculation as spec
from speculation import PARAMS, PROMPTS, WARPED, draws, new_tokens

from collab_jax import combine, decode, pool, warp
from collab_jax.cooperate.efficient import exact, tree
from collab_jax.cooperate.efficient import parallel as ph
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import Features
from collab_jax.models import table
from collab_jax.models.parallel_heads import Heads, blockwise, medusa

TREE = [(0,), (1,), (2,), (0, 0), (1, 0), (0, 1), (0, 0, 0), (1, 0, 0), (1, 0, 2)]
STEP, RING = 3, 11  # the language of the ring: behind x comes x + STEP


def seen(lm, vocab):
    """An LM of tables whose hidden states are the tokens, one-hot."""

    def shown(result, tokens):
        out, state = result
        hidden = jax.nn.one_hot(tokens, vocab)
        return out._replace(features=Features(hidden)), state

    return lm._replace(
        extend=lambda p, s, tokens: shown(lm.extend(p, s, tokens), tokens),
        branch=lambda p, s, tokens, parents: shown(
            lm.branch(p, s, tokens, parents), tokens
        ),
    )


def tables(size, vocab):
    """Heads that look their logits up by the token: parameters `[K, V, V]`."""
    return Heads(
        init=lambda key, base: jax.random.normal(key, (size, vocab, vocab)),
        apply=lambda params, base, hidden: jnp.einsum(
            "...w,kwv->...kv", hidden, params, precision="highest"
        ),
        blank=lambda base, batch: jnp.zeros((batch, vocab)),
        size=size,
    )


def ranked(odds, ahead=0):
    """Tables for the ring, and the rank that each of them gives to the right token.

    Args:
      odds: of the ranks 0, 1, ..
      ahead: by how many tokens the heads are wrong.

    Returns:
      `[K, V, V]` and `[K, V]`.
    """
    rng = np.random.default_rng(1)
    found = np.zeros((3, RING, RING), np.float32)
    place = rng.choice(len(odds), (3, RING), p=odds)
    for i in range(3):
        for x in range(RING):
            right = (x + STEP * (2 + i + ahead)) % RING
            order = [v for v in rng.permutation(RING) if v != right]
            order.insert(place[i, x], right)
            found[i, x, order] = -np.arange(RING)
    return found, place


def naive_rounds(prompt, new, place, paths):
    """(calls, drafted, accepted) of a row, by the text alone."""
    text, calls, drafted, accepted = list(prompt), 0, 0, 0
    while len(text) < len(prompt) + new:
        kept = 0
        if calls:
            last = text[-2]  # nobody has read the last one
            drafted += len(paths)
            ranks = [tuple(place[:depth, last]) for depth in (1, 2, 3)]
            kept = sum(path in paths for path in ranks)  # with its beginnings
        calls, accepted = calls + 1, accepted + kept
        for _ in range(kept + 1):
            text.append((text[-1] + STEP) % RING)
    return calls, drafted, accepted


RING_LM = warp.warp(seen(table.language_model(1), RING), warp.greedy())
RING_TABLE = jnp.log(jax.nn.one_hot((jnp.arange(RING + 1) + STEP) % RING, RING))
RING_PROMPTS = [[4], [1, 4, 7, 10, 2], [0, 3]]
ODDS = 0.65, 0.2, 0.1, 0.05
SHAPES = {"chain": [(0,), (0, 0), (0, 0, 0)], "tree": TREE}


@functools.cache
def rounds(shape, mistake=None):
    """The compiled rounds on the ring."""
    heads, verifier = tables(3, RING), exact.greedy()
    proposer = ph.parallel(heads)
    if shape == "tree":
        proposer, verifier = ph.parallel_tree(heads, TREE), tree.sampled()
    if mistake is not None:
        proposer = mistake(proposer)
    target = on_lm(RING_LM, chunk=2)
    return decode.compile(lambda _: speculate(target, proposer, 29, verifier=verifier))


def on_the_ring(program, found):
    """The result, and (calls, drafted, accepted) of every row."""
    params = RING_TABLE, (jnp.asarray(found), ())
    result = program(None, params, *decode.pad(RING_PROMPTS), jax.random.key(0))
    info = result.info
    counts = zip(info.calls, info.drafted, info.accepted, strict=True)
    return result, [tuple(map(int, row)) for row in counts]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_head_speaks_of_its_own_token(shape):
    """Round by round what a twin accepts that reads the text alone."""
    found, place = ranked(ODDS)
    result, counts = on_the_ring(rounds(shape), found)
    for row, prompt in enumerate(RING_PROMPTS):
        assert counts[row] == naive_rounds(prompt, 29, place, SHAPES[shape])
        text = [(prompt[-1] + STEP * (i + 1)) % RING for i in range(29)]
        assert new_tokens(result, row) == text
    assert result.info.taken.sum(0).min() > 0  # of every head


def late(proposer: Proposer) -> Proposer:
    """The mistake: the state of the token that is pending now, which nobody has."""
    return proposer._replace(
        observe=lambda p, state, verified: proposer.observe(
            p, state, verified._replace(count=jnp.minimum(verified.count + 1, 3))
        )
    )


def early(proposer: Proposer) -> Proposer:
    """The mistake: the state of the token that was pending in this round."""
    return proposer._replace(
        observe=lambda p, state, verified: proposer.observe(
            p, state, verified._replace(count=jnp.minimum(verified.count, 1))
        )
    )


@pytest.mark.parametrize(("mistake", "shape"), [(late, "tree"), (early, "chain")])
def test_the_state_of_another_token_is_seen(mistake, shape):
    found, place = ranked(ODDS)
    _, counts = on_the_ring(rounds(shape, mistake), found)
    for row, prompt in enumerate(RING_PROMPTS):
        calls, _, _ = naive_rounds(prompt, 29, place, SHAPES[shape])
        assert counts[row][0] > calls


@pytest.mark.parametrize("ahead", [-1, 0, 1])
def test_heads_that_are_off_by_one_are_seen(ahead):
    """Heads that would always be right, for the token before theirs or behind it."""
    found, _ = ranked([1.0], ahead)
    _, counts = on_the_ring(rounds("chain"), found)
    for calls, drafted, accepted in counts:
        assert (calls, accepted) == ((29, 0) if ahead else (8, drafted))


LAW_LM = warp.warp(
    seen(table.language_model(2), spec.VOCAB),
    warp.repetition_penalty(1.4),
    warp.top_p(0.95),
)
LAW_HEADS = tables(3, spec.VOCAB)
LAW_PARAMS = PARAMS[0], (2.0 * LAW_HEADS.init(jax.random.key(9), ()), ())
SAMPLED = ph.parallel_sampled(LAW_HEADS, warp.temperature(0.5), warp.top_p(0.95))


@functools.cache
def joint():
    return spec.target_joint(WARPED, PARAMS[0], [1, 2, 1, 2], 4)


def law_of(proposer):
    decoder = speculate(on_lm(LAW_LM), proposer, 4)
    drawn = spec.counts(decoder, LAW_PARAMS, [1, 2, 1, 2], 4, runs=3000)
    return spec.chi_square(drawn, joint())


@pytest.mark.parametrize("proposer", [ph.parallel(LAW_HEADS), SAMPLED])
def test_samples_follow_the_law(proposer):
    found, limit = law_of(proposer)
    assert found < limit


@pytest.mark.parametrize("right", [ph.parallel(LAW_HEADS), SAMPLED])
def test_a_wrong_law_is_seen(right):
    """The mistake: an argmax, or a draw from warped heads, has not the heads' law."""

    def propose(params, state, *arguments):
        draft, _ = right.propose(params, state, *arguments)
        own, base = params
        return draft._replace(law=LAW_HEADS.apply(own, base, state.hidden)), state

    found, limit = law_of(right._replace(propose=propose))
    assert found > 2 * limit


def test_a_tree_gives_the_tokens_of_plain_sampling():
    """Token for token with the same keys, in rows that end anywhere."""
    expected = draws(decode.sample(WARPED, 12, chunk=3, eos=(4,)), PARAMS[0])
    proposer, verifier = ph.parallel_tree(LAW_HEADS, TREE), tree.sampled()
    target = on_lm(LAW_LM, chunk=3)
    decoder = speculate(target, proposer, 12, verifier=verifier, eos=(4,))
    found = draws(decoder, LAW_PARAMS)
    for row in range(len(PROMPTS)):
        assert new_tokens(found, row) == new_tokens(expected, row)
    assert found.info.accepted.sum() > 3


def test_a_row_does_not_depend_on_its_batch_or_padding():
    decoder = speculate(on_lm(LAW_LM, chunk=3), SAMPLED, 12, eos=(4,))
    together = draws(decoder, LAW_PARAMS)
    program = decode.compile(lambda _: decoder)
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        padded = decode.pad([prompt], multiple=16)
        alone = program(None, LAW_PARAMS, *padded, keys[row : row + 1])
        assert new_tokens(together, row) == new_tokens(alone, 0)
    assert program._cache_size() == 1


RAGGED = [[7, 8, 9, 7, 8], [200], [3, 3, 90, 14, 2, 8, 3, 3, 9, 14, 2]]


@functools.cache
def greedy_text():
    model = small_model.model()
    plain = draws(decode.greedy(model.lm, 24), model.params, RAGGED)
    return [new_tokens(plain, row) for row in range(len(RAGGED))]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_plain_decoding(shape):
    """A random transformer, ragged prompts, an end within a block."""
    model, expected = small_model.model(), greedy_text()
    eos = expected[0][17]
    if shape == "tree":
        heads, verifier = medusa(model.backbone, 3), tree.sampled()
        proposer = ph.parallel_tree(heads, TREE)
    else:
        heads, verifier = blockwise(model.backbone, 3, inner=24), exact.greedy()
        proposer = ph.parallel(heads)
    own = heads.init(jax.random.key(1), model.params)
    target = on_lm(warp.warp(model.lm, warp.greedy()), chunk=4)
    decoder = speculate(target, proposer, 24, verifier=verifier, eos=(eos,))
    found = draws(decoder, (model.params, (own, model.params)), RAGGED)
    for row, text in enumerate(expected):
        end = text.index(eos) + 1 if eos in text else 24
        assert new_tokens(found, row) == text[:end]
    assert int(found.info.accepted.sum()) > 0


def test_a_member_of_a_composite_may_have_the_heads():
    both = combine.product([LAW_LM, LAW_LM], pool.mixture(0.5, 0.5))
    params = (PARAMS, LAW_PARAMS[1])
    proposer = ph.parallel(LAW_HEADS, read=lambda features: features[0])
    found = draws(speculate(on_lm(both), proposer, 6), params)
    assert found.info.drafted.sum() > 0
    with pytest.raises(ValueError, match="features of type tuple: say where they are"):
        draws(speculate(on_lm(both), ph.parallel(LAW_HEADS), 6), params)


def test_what_cannot_draft_is_refused():
    with pytest.raises(ValueError, match="a path of 4 tokens for 3 heads"):
        ph.parallel_tree(LAW_HEADS, [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)])
    with pytest.raises(ValueError, match=r"path \(1, 0\)"):
        ph.parallel_tree(LAW_HEADS, [(0,), (1, 0)])
    decoder = speculate(on_lm(LAW_LM), ph.parallel(LAW_HEADS), 4)
    with pytest.raises(ValueError, match="parallel heads got parameters of type"):
        draws(decoder, (PARAMS[0], LAW_PARAMS[1][0]))
    decoder = speculate(on_lm(WARPED), ph.parallel(LAW_HEADS), 4)
    with pytest.raises(ValueError, match="features of type tuple"):
        draws(decoder, LAW_PARAMS)
    narrow = tables(3, 4), jnp.zeros((3, 4, 5))
    decoder = speculate(on_lm(LAW_LM), ph.parallel(narrow[0]), 4)
    with pytest.raises(ValueError, match="hidden states of width 5 for heads of width"):
        draws(decoder, (PARAMS[0], (narrow[1], ())))
    wide = ph.parallel_tree(LAW_HEADS, [(i,) for i in range(6)])
    with pytest.raises(ValueError, match="rank 5 of a vocabulary of 5 tokens"):
        draws(speculate(on_lm(LAW_LM), wide, 4, verifier=tree.sampled()), LAW_PARAMS)
