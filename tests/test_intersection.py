"""Drafts from a model with another tokenizer: token-level intersection is lossless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from speculation import new_tokens

from collab_jax import decode, law, lm, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer
from collab_jax.translate import from_spellings, translate

# target: a b ab c bb; draft: c a b ba
BRIDGE = from_spellings([[1], [2], [1, 2], [0], [2, 2]], vocab=4)
VOCAB, PROMPT = 5, [2, 0, 4]
TARGET = warp.warp(
    table.language_model(2), warp.repetition_penalty(1.4), warp.top_p(0.95)
)
SMALL = table.language_model(3)
DRAFT = warp.warp(translate(SMALL, BRIDGE, 3.0), warp.temperature(0.8))
KEYS = jax.random.split(jax.random.key(11))
PARAMS = (
    table.init(KEYS[0], VOCAB, 2, scale=1.5),
    table.init(KEYS[1], 4, 3, scale=1.5),
)
VERIFIERS = {
    "maximal": verify.maximal(),
    "block": verify.block(),
    "gumbel": coupled.gumbel(),
}


def joints(verifiers, lms=(TARGET, DRAFT), params=PARAMS, propose=None):
    return spec.speculative_joints(
        {name: v.outcomes for name, v in verifiers.items()},
        lms,
        params,
        PROMPT,
        size=2,
        count=3,
        vocab=VOCAB,
        propose=propose,
    )


@pytest.fixture(scope="module")
def wanted():
    return spec.target_joint(TARGET, PARAMS[0], PROMPT, 3)


def test_every_verifier_keeps_the_law(wanted):
    for name, joint in joints(VERIFIERS).items():
        assert abs(joint - wanted).max() < 1e-6, name


def test_mass_of_tokens_that_are_not_shared_may_not_go_astray(wanted):
    """Drawn from the member's whole law, what is not shared becoming a, and reported
    as if it were the restricted one."""
    lost = 0.3

    def propose(logits):
        q = (1 - lost) * jnp.exp(law.log_probs(logits))
        return jnp.log(q.at[..., 0].add(lost)), logits

    for name, joint in joints(VERIFIERS, propose=propose).items():
        assert abs(joint - wanted).max() > 1e-3, name


def raw(shared_mass):
    """Token verification that reads the member's law without renormalising it."""

    def survival(logits, draft):
        log_p = law.log_probs(logits[:, :-1])
        log_q = law.log_probs(draft.law) + jnp.log(shared_mass)
        at = draft.tokens[:, :, None]
        ratio = jnp.take_along_axis(log_p, at, 2) - jnp.take_along_axis(log_q, at, 2)
        kept = jnp.where(jnp.isnan(ratio), -jnp.inf, jnp.minimum(ratio, 0.0))
        return jnp.exp(jnp.cumsum(kept[:, :, 0], axis=1))

    def resume(logits, draft, accepted):
        rows = jnp.arange(accepted.shape[0])
        p = jnp.exp(law.log_probs(logits[rows, accepted]))
        place = jnp.minimum(accepted, draft.tokens.shape[1] - 1)
        q = shared_mass * jnp.exp(law.log_probs(draft.law[rows, place]))
        whole = (accepted >= draft.count)[:, None]
        return jnp.log(jnp.where(whole, p, verify.remainder(p, q)))

    return verify.from_laws(survival, resume)


def test_a_law_that_is_not_renormalised_is_seen(wanted):
    found = joints({"right": raw(1.0), "wrong": raw(0.7)})
    assert abs(found["right"] - wanted).max() < 1e-6
    assert abs(found["wrong"] - wanted).max() > 1e-3


def loops(draft, wanted):
    """Chi-square of runs of the jitted loop, and its limit."""
    decoder = speculate(on_lm(TARGET, chunk=3), draft_lm(draft, 3, chunk=3), 3)
    drawn = spec.counts(decoder, PARAMS, PROMPT, 3, 10_000)
    return spec.chi_square(drawn, wanted)


LOOPS = {
    "sampled": DRAFT,
    # the best of the member's own tokens is often not shared: it has nothing to say
    "greedy member": translate(warp.warp(SMALL, warp.greedy()), BRIDGE, 3.0),
    # room for so little that the draft stops in its middle, or before it
    "no room": warp.warp(translate(SMALL, BRIDGE, 0.85), warp.temperature(0.8)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_runs_follow_the_law(name, wanted):
    found, limit = loops(LOOPS[name], wanted)
    assert found < limit


def llama(vocab, seed):
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    params = init(jax.random.key(seed), config)
    params = jax.tree.map(lambda x: 5.0 * x if x.ndim > 1 else x, params)
    return lm.language_model(transformer(config)), params


def test_greedy_text_is_that_of_plain_greedy():
    """The draft is the target with its tokens renamed, but that it lacks the last."""
    big, params = llama(61, 0)
    shared = 57
    order = np.random.default_rng(0).permutation(shared)  # member u is pivot order[u]
    spellings = [[int(u)] for u in np.argsort(order)]
    spellings += [[v % shared, (3 * v) % shared] for v in range(shared, 61)]
    small, _ = llama(shared, 1)
    near = jax.tree.map(
        lambda x: jnp.take(x, order, axis=x.shape.index(61)) if 61 in x.shape else x,
        params,
    )
    prompts = [[4, 50, 7], [60, 1, 2, 58, 3, 9, 41, 8, 5], [11]]
    best = warp.greedy()
    expected = spec.draws(decode.greedy(big, 24), params, prompts)
    draft = warp.warp(translate(small, from_spellings(spellings, shared)), best)
    decoder = speculate(
        on_lm(warp.warp(big, best), chunk=4), draft_lm(draft, 3, chunk=4), 24
    )
    found = spec.draws(decoder, (params, near), prompts)
    for row in range(len(prompts)):
        assert new_tokens(found, row) == new_tokens(expected, row)
    accepted, calls = found.info.accepted, found.info.calls
    assert accepted[2] > 2 * calls[2]
    assert accepted.sum() > 0.5 * calls.sum()


def test_a_row_without_room_goes_on_without_drafts():
    """The first prompt fills the draft's cache; the other row still drafts."""
    crowded = warp.warp(translate(SMALL, BRIDGE, 0.8), warp.temperature(0.8))
    prompts = [[2, 4] * 5, [0]]
    results = {}
    for name, model in (("crowded", crowded), ("roomy", DRAFT)):
        decoder = speculate(
            on_lm(TARGET), draft_lm(model, 2), 6, verifier=coupled.gumbel()
        )
        results[name] = spec.draws(decoder, PARAMS, prompts)
    for row in range(2):
        assert new_tokens(results["crowded"], row) == new_tokens(results["roomy"], row)
    drafted = results["crowded"].info.drafted
    assert drafted[0] == 0
    assert drafted[1] > 0


def test_a_draft_without_a_bridge_is_refused():
    decoder = speculate(on_lm(TARGET), draft_lm(SMALL, 2), 4)
    with pytest.raises(ValueError, match="translate"):
        spec.draws(decoder, PARAMS, [PROMPT])
