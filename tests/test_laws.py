"""The five laws over the zoo of LMs and combinators, with controls that must fail."""

import jax
import jax.numpy as jnp
import pytest

from collab_jax import combine, pool, slots, warp
from collab_jax.lm import branch_by_rows
from collab_jax.models import table
from collab_jax.testing import check_lm

VOCAB, BATCH = 5, 3


def toy(order=2, seed=0):
    return table.language_model(order), table.init(
        jax.random.key(seed), VOCAB, order, scale=2.0
    )


def prompts(seed, width=4, batch=BATCH):
    tokens = jax.random.randint(jax.random.key(seed), (batch, width), 0, VOCAB)
    return tokens, 1 + jnp.arange(batch) % width


def prefixed(seed=0, order=2):
    lm, params = toy(order, seed)
    return combine.prefixed(lm, chunk=2), (params, *prompts(seed))


def product(weights=(0.7, 0.3)):
    (a, pa), (b, pb) = toy(1, 1), toy(3, 2)
    return combine.product([a, b], pool.mixture(*weights)), (pa, pb)


def stacked():
    lm, _ = toy()
    params = jnp.stack([toy(2, seed)[1] for seed in range(3)])
    return combine.stacked(lm, 3, pool.linear(1, 1, -1)), params


def context_aware():
    lm, params = toy(3)
    tokens = jnp.stack([prompts(0)[0], prompts(1)[0]])
    length = jnp.stack([prompts(0)[1], jnp.ones(BATCH, jnp.int32)])
    axes = (None, 0, 0)
    aware = combine.stacked(combine.prefixed(lm), 2, pool.linear(1.5, -0.5), axes)
    return aware, (params, tokens, length)


def warped(*warps):
    lm, params = product()
    return warp.warp(lm, *warps), params


def by_rows():
    lm, params = product()
    return branch_by_rows(lm), params


def proxy_tuned_ensemble():
    """Three deep: product(stacked, warp(prefixed), warp(by rows))."""
    first, p1 = stacked()
    second, p2 = prefixed(5)
    third, p3 = toy(1, 9)
    lm = combine.product(
        [
            first,
            warp.warp(second, warp.temperature(0.8), warp.repetition_penalty(1.2)),
            warp.warp(branch_by_rows(third), warp.top_p(0.9)),
        ],
        pool.linear(1, 1, -1),
    )
    return lm, (p1, p2, p3)


ZOO = {
    "table 0": lambda: toy(0),
    "table 1": lambda: toy(1),
    "table 3": lambda: toy(3),
    "prefixed": prefixed,
    "product": product,
    "stacked": stacked,
    "context-aware": context_aware,
    "minimum": lambda: (combine.product([toy(1)[0], toy(2)[0]], pool.minimum()),
                        (toy(1)[1], toy(2)[1])),
    "vote": lambda: (combine.product([toy(1)[0], toy(2)[0], toy(2)[0]], pool.vote()),
                     (toy(1)[1], toy(2)[1], toy(2, 5)[1])),
    "contrast": lambda: (
        combine.product([toy(2)[0], toy(1)[0]], pool.contrast(0.1, 0.5)),
        (toy(2)[1], toy(1)[1]),
    ),
    "temperature, top-k, min-p": lambda: warped(
        warp.temperature(0.7), warp.top_k(3), warp.min_p(0.01)
    ),
    "greedy": lambda: warped(warp.greedy()),
    "forbid": lambda: warped(warp.forbid([1, 3])),
    "penalties": lambda: warped(
        warp.repetition_penalty(1.3), warp.frequency_penalty(0.2, 0.1), warp.top_p(0.9)
    ),
    "by rows": by_rows,
    "warp of prefixed": lambda: (
        warp.warp(prefixed()[0], warp.repetition_penalty(1.5)), prefixed()[1]
    ),
    "three deep": proxy_tuned_ensemble,
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("jit", [False, True])
def test_laws(name, jit):
    lm, params = ZOO[name]()
    check_lm(lm, params, VOCAB, batch=BATCH, tolerance=1e-6, jit=jit)


@pytest.mark.parametrize("jit", [False, True])
def test_the_table_is_bitwise(jit):
    check_lm(*toy(3), VOCAB, tolerance=0, jit=jit)


def off_by_one():
    lm, params = toy()

    def extend(params, state, tokens):
        moved = state._replace(length=state.length + 1)
        buffer = slots.write(state.tokens, tokens, moved.length)
        out, after = lm.extend(params, state._replace(tokens=buffer), tokens[:, :0])
        del out
        good, _ = lm.extend(params, state, tokens)
        return good, after._replace(
            tokens=buffer, length=state.length + tokens.shape[1]
        )

    return lm._replace(extend=extend), params


def forgetful_rewind():
    lm, params = product()
    first, _ = toy(1)

    def rewind(state, count):
        return (first.rewind(state[0], count), state[1])

    return lm._replace(rewind=rewind), params


def sees_its_sibling():
    lm, params = toy()

    def branch(params, state, tokens, parents):
        chain = jnp.broadcast_to(jnp.arange(parents.shape[1]) - 1, parents.shape)
        return lm.branch(params, state, tokens, chain)

    return lm._replace(branch=branch), params


def lockstep_rows():
    lm, params = toy()

    def rewind(state, count):
        return lm.rewind(state, jnp.broadcast_to(count.max(), count.shape))

    return lm._replace(rewind=rewind), params


def take_moves_no_history():
    lm, params = toy()

    def take(state, rows):
        tokens = state.tokens[jnp.arange(rows.shape[0]) % state.tokens.shape[0]]
        return state._replace(tokens=tokens, length=state.length[rows])

    return lm._replace(take=take), params


def penalty_counts_the_whole_tree():
    lm, params = warped(warp.repetition_penalty(3.0))

    def branch(params, state, tokens, parents):
        out, after = lm.branch(params, state, tokens, parents)
        chain = jnp.broadcast_to(jnp.arange(parents.shape[1]) - 1, parents.shape)
        seen = slots.visible(state.length, 6, state.tokens.shape[1], chain)
        history = warp.History(after.tokens, seen)
        raw, _ = product()[0].branch(params, state.inner, tokens, parents)
        wrong = warp.repetition_penalty(3.0).apply(raw.logits, history)
        return out._replace(logits=wrong), after

    return lm._replace(branch=branch), params


WRONG = {
    "chunk|rewind|rows": off_by_one,
    "rewind": forgetful_rewind,
    "branch": sees_its_sibling,
    "rows": lockstep_rows,
    "take": take_moves_no_history,
    "branch ": penalty_counts_the_whole_tree,
}


@pytest.mark.parametrize("law", WRONG)
def test_wrong_models_fail(law):
    lm, params = WRONG[law]()
    with pytest.raises(AssertionError, match=f"law of ({law.strip()})"):
        check_lm(lm, params, VOCAB, batch=BATCH, tolerance=1e-6, jit=True)
