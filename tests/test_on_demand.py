"""Ensembles on demand: twins that recompute all, laws, speculation, beams, counts."""

import functools

import jax
import jax.numpy as jnp
import naive_beam
import numpy as np
import pytest
import speculation as spec
import transferring as own
from transferring import KEY, NEW, PROMPTS, TABLE, TABLES, VOCAB

from collab_jax import beam, combine, decode, pool, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.growth import ranked
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.cooperate.efficient.tree import sampled
from collab_jax.ensemble import gates
from collab_jax.ensemble.on_demand import counted, on_demand
from collab_jax.models import table
from collab_jax.testing import check_lm

WEIGHTS = (0.5, 0.2, 0.3)
WIDTH = 3
# name -> (index, threshold): most, some and no places are asked
GATES = {
    "confidence": (0, 0.6),
    "entropy": (1, 1.3),
    "margin": (2, 0.35),
    "never": (0, 0.0),
    "always": (1, 0.0),
}


def chosen(knob):
    """A gate whose kind and threshold are parameters, so that one program does all."""
    which, threshold = (0, 0.5) if knob is None else knob
    kinds = gates.confidence, gates.entropy, gates.margin

    def gate(out):
        return jnp.stack([kind(threshold)(out) for kind in kinds])[which]

    return gate


def ensemble(lm, width=WIDTH, make=on_demand):
    """Three members of one kind behind a gate that is a parameter."""
    pooled = pool.mixture(*WEIGHTS)
    return own.knobbed(lambda knob: make([lm] * 3, chosen(knob), pooled, width))


def asks(name, law):
    """The definition of a gate, from log-probs [V] in float64."""
    _, threshold = GATES[name]
    p = np.exp(law)
    first, second = sorted(p)[::-1][:2]
    if name in ("confidence", "never"):
        return first < threshold
    if name == "margin":
        return first - second < threshold
    return -(p * law).sum() > threshold


def twin(lm, params, name):
    """Behind a text: every member reads it anew, if the first is unsure."""

    def law(text, row):
        del row
        laws = [own.log_softmax(own.logits(lm, p, text)) for p in params]
        if not asks(name, laws[0]):
            return laws[0]
        return np.log(sum(w * np.exp(z) for w, z in zip(WEIGHTS, laws, strict=True)))

    return law


def knob(name):
    which, threshold = GATES[name]
    return jnp.array(which), jnp.array(threshold)


@pytest.mark.parametrize("kind", ["table", "model"])
def test_twin_laws_target_and_draft(kind):
    lm, params = own.kinds()[kind]
    params = params[:3]
    names = list(GATES) if kind == "table" else ["entropy"]
    cases = {name: ((knob(name), params), twin(lm, params, name)) for name in names}
    atol = 2e-5 if kind == "table" else 2e-4
    laws = ("confidence",) if kind == "table" else ()
    own.check_methods(ensemble(lm), cases, laws=laws, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("kind", ["table", "model"])
def test_laws(kind, name):
    lm, params = own.kinds()[kind]
    jit = None if (kind, name) == ("table", "confidence") else True
    check_lm(ensemble(lm), (knob(name), params[:3]), VOCAB, tolerance=2e-5, jit=jit)


def compiled(lm, params, name, width=WIDTH, prompts=PROMPTS, new=NEW):
    decoder = counted(decode.greedy(ensemble(lm, width), new, chunk=4))
    return decode.run(decoder, (knob(name), params), *decode.pad(prompts), KEY)


def test_it_reports_how_often_members_were_asked():
    """By row as the twin finds, and few calls where few places are asked."""
    params = TABLES[:3]
    for name in ("confidence", "never", "always"):
        found = compiled(TABLE, params, name)
        places = [
            [
                asks(name, own.log_softmax(own.logits(TABLE, params[0], text[:here])))
                for here in range(len(prompt), len(prompt) + NEW)
            ]
            for prompt, text in zip(PROMPTS, found.tokens.tolist(), strict=True)
        ]
        assert found.info.asked.tolist() == [sum(row) for row in places]
        first, others = found.info.calls.tolist()
        assert first == NEW
        # one call a step in which any row asks, and one for W tokens that were missed
        steps = np.any(places, axis=0).sum()
        assert steps <= others <= (steps + NEW // WIDTH if steps else 0)
    assert others == NEW


def test_members_that_were_long_not_asked_catch_up_in_few_calls():
    """A lag of W tokens and more takes as many calls as it has pieces of W."""
    sure = jnp.full((VOCAB + 1, VOCAB), 0.0).at[:, 2].set(9.0)  # 2, 2, 2 ...
    sure = sure.at[3].set(0.0)  # but unsure behind 3
    lm, other = table.language_model(1), table.init(jax.random.key(1), VOCAB, 2)
    model = on_demand([lm, TABLE], gates.confidence(0.5), lambda zs: zs[1], width=WIDTH)
    params = sure, other
    state = model.init(params, 1, 16)
    text = [1, 2, 2, 4, 5, 2, 1, 0, 3]
    calls = []
    for token in text:
        out, state = model.extend(params, state, jnp.array([[token]]))
        calls.append(int(state.calls[1]))
    assert calls == [0] * 8 + [3]  # 9 tokens in pieces of 3
    assert bool(out.features.asked[0, 0])
    expected = own.logits(TABLE, other, text)
    np.testing.assert_allclose(out.logits[0, 0], expected, atol=1e-6)


def test_a_row_that_is_done_asks_no_more():
    """It reads its end again at every step, and the answer is remembered."""
    sure = jnp.zeros((VOCAB + 1, VOCAB)).at[2, 2].set(9.0)  # 2, 2, 2 ..., else unsure
    ends = jnp.zeros((VOCAB + 1, VOCAB)).at[:, 5].set(9.0)
    lm = table.language_model(1)
    model = on_demand([lm, lm], gates.confidence(0.5), lambda zs: zs[1], width=WIDTH)
    decoder = counted(decode.greedy(model, 8, eos=(5,)))
    found = decode.run(decoder, (sure, ends), *decode.pad([[2], [3]]), KEY)
    assert found.length.tolist() == [9, 2]
    assert found.info.asked.tolist() == [0, 1]
    assert found.info.calls.tolist() == [8, 2]  # behind 3, and once behind the end
    # what is remembered is forgotten with what stood before it
    model = on_demand([lm, TABLE], gates.confidence(0.5), lambda zs: zs[1])
    params = jnp.zeros_like(sure), TABLES[1]
    state = model.init(params, 1, 8)
    for text in ([1, 3], [4, 3]):
        for token in text:
            out, state = model.extend(params, state, jnp.array([[token]]))
        expected = own.logits(TABLE, TABLES[1], text)
        np.testing.assert_allclose(out.logits[0, 0], expected, atol=1e-6)
        state = model.rewind(state, jnp.array([2]))


def forgetful(members, gate, pooled, width):
    """A mistake known from public code: who is not asked misses the token."""
    right = on_demand(members, gate, pooled, width)

    def extend(params, state, tokens):
        out, after = right.extend(params, state, tokens)
        lag = after.length - after.read
        fresh = jnp.where(lag > 0, after.length, after.read)
        return out, after._replace(read=fresh)

    return right._replace(extend=extend)


def test_a_cache_that_misses_tokens_is_another_ensemble():
    params, wrong = TABLES[:3], ensemble(TABLE, make=forgetful)
    program = decode.compile(lambda _: decode.greedy(wrong, NEW, chunk=4))
    unlike = 0
    for name in ("confidence", "entropy", "margin"):
        law = twin(TABLE, params, name)
        for prompt in PROMPTS:  # row by row: a call for one row serves all
            start = decode.pad([prompt], multiple=8)
            found = program(None, (knob(name), params), *start, KEY)
            try:
                own.check_twin(found, law, [prompt])
            except AssertionError:
                unlike += 1
    assert unlike


def test_members_that_keep_what_was_taken_back_break_a_law():
    def keeps(members, gate, pooled, width):
        right = on_demand(members, gate, pooled, width)

        def rewind(state, count):
            after = right.rewind(state, count)
            return after._replace(others=state.others)

        return right._replace(rewind=rewind)

    params = knob("confidence"), TABLES[:3]
    with pytest.raises(AssertionError, match="law of rewind"):
        check_lm(ensemble(TABLE, make=keeps), params, VOCAB, jit=True)


def test_identities():
    """Never is the first member, always is the product, bit by bit."""
    params = TABLES[:3]
    whole = combine.product([TABLE] * 3, pool.mixture(*WEIGHTS))
    plain = {"never": (TABLE, params[0]), "always": (whole, params)}
    for name, (lm, trees) in plain.items():
        found = compiled(TABLE, params, name)
        expected = decode.run(
            decode.greedy(lm, NEW, chunk=4), trees, *decode.pad(PROMPTS), KEY
        )
        assert own.same_text(found, expected)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_wide_calls_are_the_narrow_ones():
    """A prompt read at once, in pieces, or by members that lag."""
    params = knob("entropy"), TABLES[:3]
    text = jax.random.randint(jax.random.key(2), (2, 12), 0, VOCAB)
    results, model = [], ensemble(TABLE)
    extend = jax.jit(model.extend)
    for cuts in ([12], [1] * 12, [2, 1, 9], [5, 3, 4], [1, 1, 1, 6, 3]):
        state, at = model.init(params, 2, 12), 0
        pieces = []
        for size in cuts:
            piece = text[:, at : at + size]
            out, state = extend(params, state, piece)
            pieces.append(out.logits)
            at += size
        results.append(jnp.concatenate(pieces, axis=1))
    for found in results[1:]:
        np.testing.assert_allclose(found, results[0], atol=1e-6)


def test_a_tree_of_drafts():
    params = knob("confidence"), TABLES[:3]
    target = warp.warp(ensemble(TABLE), warp.greedy())
    proposer = draft_tree(TABLE, ranked([(0,), (1,), (0, 0), (1, 0)]))
    decoder = counted(speculate(on_lm(target), proposer, NEW, verifier=sampled()))
    found = spec.draws(decoder, (params, TABLES[4]), PROMPTS)
    plain = decode.greedy(ensemble(TABLE), NEW)
    expected = spec.draws(plain, params, PROMPTS)
    assert own.same_text(found, expected)
    assert found.info.calls[1] > 0


def test_beam_search():
    params = TABLES[:3]
    law = twin(TABLE, params, "confidence")
    searched = counted(beam.search(ensemble(TABLE), 4, 3, length_penalty=0.0, chunk=4))
    trees = knob("confidence"), params
    found = decode.run(searched, trees, *decode.pad(PROMPTS), KEY)
    beams = found.info.info.beams
    for row, prompt in enumerate(PROMPTS):
        ended = naive_beam.search(lambda text: law(text, 0), prompt, 3, 4, 0.0)
        assert beams.tokens[row].tolist() == [text for _, text in ended]
        expected = [score for score, _ in ended]
        np.testing.assert_allclose(beams.score[row], expected, rtol=1e-5)
    assert found.info.asked.shape == (9,)
    assert 0 < found.info.calls[1] <= found.info.calls[0] == 4


def test_thresholds_are_swept_in_one_trace():
    traces = []

    @jax.jit
    def nats(threshold, weight):
        traces.append(None)
        model = on_demand(
            [TABLE] * 2, gates.confidence(threshold), pool.mixture(weight, 1 - weight)
        )
        text = jnp.array([[1, 2, 3, 4, 5, 6]])
        out, _ = model.extend(TABLES[:2], model.init(TABLES[:2], 1, 6), text)
        log_p = jax.nn.log_softmax(out.logits[0, :-1])
        return -jnp.take_along_axis(log_p, text[0, 1:, None], 1).mean()

    values = [float(nats(t, 0.3)) for t in (0.0, 0.4, 1.0)]
    assert len(traces) == 1
    assert len(set(values)) == 3
    near = [float(nats(0.6, w)) for w in (0.299, 0.301)]
    slope = float(jax.grad(nats, argnums=1)(0.6, 0.3))
    assert slope == pytest.approx((near[1] - near[0]) / 0.002, rel=0.02)


def test_what_is_forbidden_and_what_is_nan():
    """A NaN of the first is never unsure; a dead law asks; others' NaN shows."""
    lm = table.language_model(0)
    model = on_demand([lm, lm], gates.confidence(0.9), pool.mixture(0.5, 0.5))

    def law(first, other):
        params = jnp.array([first]), jnp.array([other])
        out, _ = model.extend(params, model.init(params, 1, 1), jnp.array([[0]]))
        return out.logits[0, 0], bool(out.features.asked[0, 0])

    assert jnp.isnan(law([jnp.nan, 0.0], [0.0, 0.0])[0]).any()
    assert not law([jnp.nan, 0.0], [0.0, 0.0])[1]
    dead, asked = law([-jnp.inf, -jnp.inf], [0.0, -jnp.inf])
    assert asked
    assert jnp.isneginf(dead).tolist() == [False, True]
    assert jnp.isnan(law([0.0, 0.0], [jnp.nan, 0.0])[0]).all()
    assert not jnp.isnan(law([99.0, 0.0], [jnp.nan, 0.0])[0]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: on_demand([TABLE], chosen(None), pool.mixture()), "1 members"),
        (lambda: on_demand([TABLE] * 2, chosen(None), pool.mixture(), 0), "width = 0"),
        (lambda: gates.confidence(1.5), "least = 1.5"),
        (lambda: gates.entropy(-1), "most = -1"),
        (lambda: gates.margin(-0.1), "least = -0.1"),
        (lambda: gates.learned(jnp.ones(3), 2), "threshold = 2"),
        (lambda: ensemble(TABLE).init((None, TABLES[:2]), 1, 4), "3 members"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_ensemble_is_counted():
    with pytest.raises(ValueError, match="0 ensembles"):
        counted(decode.greedy(TABLE, 2)).init(
            TABLES[0], *decode.pad([[1]]), jax.random.key(0)
        )


@functools.cache
def drafted():
    """A draft that is itself an ensemble on demand, counted."""
    params = knob("confidence"), TABLES[:3]
    draft = draft_lm(warp.warp(ensemble(TABLE), warp.greedy()), 2)
    target = on_lm(warp.warp(TABLE, warp.greedy()))
    decoder = counted(speculate(target, draft, NEW))
    return spec.draws(decoder, (TABLES[4], params), PROMPTS)


def test_the_draft_is_counted_too():
    first, others = drafted().info.calls.tolist()
    assert 0 < others <= first
