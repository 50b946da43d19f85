"""The speculative loop against the law that it has to follow, by chi-square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec
from speculation import PARAMS, VERIFIERS, WARPED, copies, rounds

from collab_jax import decode, law, warp
from collab_jax.cooperate.efficient import verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.stopping import confidence, schedule
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table


@functools.cache
def joint(tokens=4):
    return spec.target_joint(WARPED, PARAMS[0], [1, 2], tokens)


def chi_square(decoder, runs=20_000, tokens=4, params=PARAMS):
    drawn = spec.counts(decoder, params, [1, 2], tokens, runs)
    return spec.chi_square(drawn, joint(tokens))


@pytest.mark.parametrize("name", VERIFIERS)
def test_runs_follow_the_law(name):
    found, limit = chi_square(rounds(VERIFIERS[name](), 4))
    assert found < limit


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    "rule", [confidence(0.5), schedule(2, 3)], ids=["confidence", "schedule"]
)
def test_stopping_rules_keep_the_law(rule, greedy):
    proposer = draft_lm(WARPED, 3, stopping=rule, greedy=greedy)
    decoder = speculate(on_lm(WARPED), proposer, 4)
    found, limit = chi_square(decoder, params=(PARAMS[0], (PARAMS[1], ())))
    assert found < limit


def test_one_hot_drafts_of_any_length_keep_the_law():
    found, limit = chi_square(
        speculate(on_lm(WARPED), copies(3), 4), params=(PARAMS[0], ())
    )
    assert found < limit


def narrow(verifier, runs=20_000):
    """Worst chi-square of four positions, over its limit; most drafts are wrong.

    Sixteen tokens and q = p reversed, where shared noise shows best.
    """
    p = table.init(jax.random.key(0), 16, 0)
    model = table.language_model(0)
    decoder = speculate(on_lm(model), draft_lm(model, 4), 4, verifier=verifier)
    drawn = spec.counts(decoder, (p, p[:, ::-1]), [1], 4, runs)
    one = spec.target_joint(model, p, [1], 1)
    pairs = [spec.chi_square(drawn[:, i : i + 1], one) for i in range(4)]
    return max(found / limit for found, limit in pairs)


@pytest.mark.parametrize("name", VERIFIERS)
def test_wrong_drafts_keep_the_law(name):
    assert narrow(VERIFIERS[name]()) < 1


def test_noise_kept_from_round_to_round_is_seen():
    """Block verification has looked at tokens that would be drawn again.

    Token verification has not: there, noise that belongs to the position is right.
    """
    assert narrow(verify.block()._replace(coupled=True), 60_000) > 2
    assert narrow(verify.maximal()._replace(coupled=True), 60_000) < 1


def redrawn(stream):
    """Token verification whose next token is drawn from a given stream."""
    right = verify.maximal()

    def verify_(key, length, out, draft):
        found = right.verify(key, length, out, draft)
        accepted = found.accepted
        law_ = right.outcomes(out.logits, draft)[jnp.arange(len(accepted)), accepted]
        again = verify.round_key(key, length, stream)
        token = law.draw(jnp.log(law_), again, length + accepted)
        return verify.chain(draft, out, accepted, token)

    return right._replace(verify=verify_)


def test_shared_streams_are_seen():
    assert narrow(redrawn(law.DRAFT)) > 2
    assert narrow(redrawn(law.RESIDUAL)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [16, 4096])
@pytest.mark.parametrize("name", VERIFIERS)
def test_many_runs_follow_the_law_at_every_position(name, vocab):
    """200,000 runs of the jitted loop; q is p reversed, so most drafts are wrong."""
    runs, rows = 200_000, 200_000 if vocab == 16 else 4_000
    new = 5 if vocab == 16 else 3
    p = table.init(jax.random.key(0), vocab, 0, scale=2.0)
    model = table.language_model(0)
    lm = warp.warp(model, warp.temperature(0.8))
    if vocab == 16:
        lm = warp.warp(lm, warp.top_p(0.95))
    draft = warp.warp(model, warp.temperature(1.2))
    decoder = speculate(
        on_lm(lm), draft_lm(draft, new - 1), new, verifier=VERIFIERS[name]()
    )
    program = decode.compile(lambda _: decoder)
    prompt, length = decode.pad([[1]] * rows)
    drawn = []
    for seed in range(runs // rows):
        key = jax.random.key(seed)
        found = program(None, (p, p[:, ::-1]), prompt, length, key)
        drawn.append(np.asarray(found.tokens)[:, 1:])
    drawn = np.concatenate(drawn)
    one = spec.target_joint(lm, p, [1], 1)
    for position in range(new):
        found, limit = spec.chi_square(drawn[:, position : position + 1], one)
        assert found < limit, position
    wrong, limit = spec.chi_square(drawn[:, :1], one[::-1])
    assert wrong > limit
