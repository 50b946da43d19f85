"""Methods of transfer as LMs: twins, laws, speculation, prompts of their own."""

import jax
import jax.numpy as jnp
import naive_beam
import numpy as np
import pytest
import transferring as own
from naive_transfer import FORMS, twin
from transferring import KEY, PROMPTS, TABLE, TABLES, check_methods, logits

from collab_jax import combine, decode, law, pool
from collab_jax.combine import prefixed
from collab_jax.cooperate.transfer import context, contrast, offset

KNOB = 0.6
START = [[0]] * 3
# prompts of the members' own, of other lengths in every row and for every member
CONTEXTS = [[3, 1, 5, 2], [6], [2, 2, 4]]
BARE = [[2], [6, 1, 1, 0, 5], [4]]
CHATS = [[5, 5], [1, 2, 3], [0]]


def of_first(name):
    """The pool, over as many of the first members as it takes."""
    count, form = FORMS[name]
    return lambda members: form(KNOB)(members[:count])


def cases(lm, params, names):
    """name -> (index and parameters, the twin behind a text)."""

    def behind(name):
        count = FORMS[name][0]

        def read(text, row):
            del row
            return twin(name, KNOB, [logits(lm, p, text) for p in params[:count]])

        return read

    return {
        name: ((jnp.array(n), params), behind(name)) for n, name in enumerate(names)
    }


def test_pools_of_tables():
    names = list(FORMS)
    lm = own.pooled(TABLE, {name: of_first(name) for name in names}, 5)
    laws = ("contrastive", "adacad", "dola", "sled")  # the others are pointwise too
    check_methods(lm, cases(TABLE, TABLES, names), laws=laws)


def test_pools_of_transformers():
    names = ["contrastive", "dexperts", "adacad"]
    members = own.models()[:3]
    lm = own.pooled(own.MODEL, {name: of_first(name) for name in names}, 3)
    check_methods(lm, cases(own.MODEL, members, names), atol=2e-4)


def aware(lm):
    """CAD and AdaCAD under two prompts, as one program: the knobs are parameters."""

    def make(knob):
        alpha, least, scale = (0.5, 0.0, 1.0) if knob is None else knob

        def both(members):
            fixed = context.cad(alpha)(members)
            return jnp.where(scale > 0, context.adacad(least, scale)(members), fixed)

        return context.contextual(lm, both, chunk=2)

    return own.knobbed(make)


def behind_contexts(lm, params, name, w):
    def read(text, row):
        texts = [prompts[row] + text[1:] for prompts in (CONTEXTS, BARE)]
        return twin(name, w, [logits(lm, params, one) for one in texts])

    return read


@pytest.mark.parametrize("kind", ["table", "model"])
def test_context_aware_decoding(kind):
    lm, (params, *_) = own.kinds()[kind]
    both = context.contexts(params, CONTEXTS, BARE)
    given = {
        "cad": (jnp.array([0.7, 0.0, 0.0]), "cad", 0.7),
        "adacad": (jnp.array([0.0, 0.02, 2.0]), "adacad", 2.0),
    }
    trials = {
        name: ((knob, both), behind_contexts(lm, params, method, w))
        for name, (knob, method, w) in given.items()
    }
    atol = 2e-5 if kind == "table" else 2e-4
    laws = ("adacad",) if kind == "table" else ()
    check_methods(aware(lm), trials, START, laws, atol)


def test_a_context_changes_the_text_and_alpha_0_ignores_the_other_prompt():
    both = context.contexts(TABLES[0], CONTEXTS, BARE)
    decoder = decode.compile(lambda _: decode.greedy(aware(TABLE), own.NEW))
    texts = [
        np.asarray(decoder(None, (jnp.array(k), both), *decode.pad(START), KEY).tokens)
        for k in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0])
    ]
    for text, prompts in ((texts[0], CONTEXTS), (texts[2], BARE)):
        alone = decode.run(
            decode.greedy(TABLE, own.NEW), TABLES[0], *decode.pad(prompts), KEY
        )
        for row, prompt in enumerate(prompts):
            new = np.asarray(alone.tokens)[row, len(prompt) :][: own.NEW]
            assert (text[row, 1:] == new).all()
    assert (texts[0] != texts[1]).any()


def test_members_with_prompts_of_their_own():
    """Proxy tuning: chat prompts for the tuned pair, none for the base."""
    lm = combine.product(
        [TABLE, prefixed(TABLE, 2), prefixed(TABLE, 2)], offset.proxy_tuning(0.8)
    )
    params = TABLES[0], *((p, *decode.pad(CHATS)) for p in TABLES[1:3])

    def read(text, row):
        texts = text, CHATS[row] + text[1:], CHATS[row] + text[1:]
        members = zip(TABLES[:3], texts, strict=True)
        return twin("proxy tuning", 0.8, [logits(TABLE, *one) for one in members])

    check_methods(lm, {"chats": (params, read)}, [[3], [1], [0]], ("chats",))


def search_program(measure=None):
    def make(knobs):
        form = contrast.contrastive(knobs[0], knobs[1], knobs[2])
        lm = combine.product([TABLE] * 2, form)
        if measure is None:
            return contrast.contrastive_search(lm, 4, 3, length_penalty=0.0, chunk=4)
        rest = {"length_penalty": 0.0, "chunk": 4}
        return contrast.beam.search(lm, 4, 3, measure=measure, **rest)

    return decode.compile(make)


def test_contrastive_search_is_a_beam_search_over_scores():
    alpha, strength, temperature = knobs = (0.1, 0.8, 0.5)

    def scores(text):
        amateur = own.log_softmax(logits(TABLE, TABLES[1], text) / temperature)
        expert = own.log_softmax(logits(TABLE, TABLES[0], text))
        kept = np.exp(expert) >= alpha * np.exp(expert).max()
        return np.where(kept, expert - strength * amateur, -np.inf)

    prompt, length = decode.pad(PROMPTS)
    found = search_program()(jnp.array(knobs), TABLES[:2], prompt, length, KEY)
    normalised = search_program(law.log_probs)
    wrong = normalised(jnp.array(knobs), TABLES[:2], prompt, length, KEY)
    unlike = 0
    for row, one in enumerate(PROMPTS):
        ended = naive_beam.search(scores, one, 3, 4, 0.0)
        beams = found.info.beams
        assert beams.tokens[row].tolist() == [text for _, text in ended]
        expected = [score for score, _ in ended]
        np.testing.assert_allclose(beams.score[row], expected, rtol=1e-5)
        unlike += beams.tokens[row].tolist() != wrong.info.beams.tokens[row].tolist()
    assert unlike, "a search over the law that is made of the scores finds other beams"


def test_contrastive_search_of_strength_0_is_beam_search():
    prompt, length = decode.pad(PROMPTS)
    knobs = jnp.array([0.0, 0.0, 1.0])
    found = search_program()(knobs, TABLES[:2], prompt, length, KEY)
    plain = contrast.beam.search(TABLE, 4, 3, length_penalty=0.0)
    expected = decode.run(plain, TABLES[0], prompt, length, KEY)
    assert (found.tokens == expected.tokens).all()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_a_contrast_of_beta_0_decodes_as_the_expert():
    lm = combine.product([TABLE] * 2, pool.contrast(1e-9, 0.0))
    prompt, length = decode.pad(PROMPTS)
    found, expected = (
        decode.run(decode.greedy(one, 6), params, prompt, length, KEY)
        for one, params in ((lm, TABLES[:2]), (TABLE, TABLES[0]))
    )
    assert (found.tokens == expected.tokens).all()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_a_strength_is_learned_through_decoding_laws():
    """The gradient of the likelihood of a text, by the strength of an offset."""
    text = jnp.array([[1, 3, 2, 5, 0, 4]])

    def nats(alpha):
        lm = combine.product([TABLE] * 3, offset.proxy_tuning(alpha))
        out, _ = lm.extend(TABLES[:3], lm.init(TABLES[:3], 1, 6), text)
        log_p = law.log_probs(out.logits[:, :-1])
        return -jnp.take_along_axis(log_p, text[:, 1:, None], 2).mean()

    both = jax.jit(jax.value_and_grad(nats))
    slope = (both(0.51)[0] - both(0.49)[0]) / 0.02
    np.testing.assert_allclose(both(0.5)[1], slope, rtol=1e-2)
