"""A budget over the batch: never overspent, well spent, and the law of every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculation as spec

from collab_jax import decode, law
from collab_jax.cooperate.efficient.budget import budget
from collab_jax.cooperate.efficient.draft import Verified
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import Out
from collab_jax.models import table

LM = table.language_model(2)
PARAMS = tuple(table.init(key, 4, 2, scale=1.5) for key in spec.KEYS)
PROMPT, ROWS = [1, 2], 10_000


def naive(rates, going, spent, total, length):
    """Who goes on, by the sorted list of all tokens that could still be drafted."""
    nodes = []
    for b, row in enumerate(rates):
        survival = np.sum(np.log(row), dtype=np.float32)
        mean = survival / np.float32(len(row))
        nodes += [
            (-(survival + mean * np.float32(d)), b, d)
            for d in range(length - len(row))
            if going[b]
        ]
    best = sorted(nodes)[: max(total - spent, 0)]
    return [(b, 0) in {(b, d) for _, b, d in best} for b in range(len(rates))]


@pytest.mark.parametrize("total", [3, 7, 12, 100])
def test_the_best_tokens_are_drafted(total):
    rows, length, rng = 5, 4, np.random.default_rng(total)
    rule, done = budget(total, length), np.array([0, 0, 1, 0, 0], bool)
    state = rule.init((), rows)
    step = jax.jit(rule.step)
    state = rule.observe((), state, Verified(None, jnp.asarray(~done * 1), *[None] * 4))
    for _ in range(3):  # rounds
        going, spent = ~done, 0
        rates = [[] for _ in range(rows)]
        for i in range(length):
            spent += going.sum()
            rate = rng.uniform(0.1, 1.0, rows)
            for b in range(rows):
                rates[b].append(rate[b])
            logits = jnp.log(jnp.asarray(np.stack([1 - rate, rate], -1)))
            out, token = Out(logits), jnp.ones(rows, int)
            state, stop = step((), state, jnp.array(i), out, token)
            going = going & naive(rates, going, spent, total, length)
            assert (~stop).tolist() == going.tolist()
            assert int(state.spent) == spent
        assert spent <= max(total, (~done).sum())
        assert spent == min(max(total, 4), 4 * length)  # nothing is left over


def cut(proposer, total):
    """Chooses among tokens that were drafted, by their own confidence as well."""

    def propose(params, state, tokens, length, key):
        draft, state = proposer.propose(params, state, tokens, length, key)
        log_q = law.log_probs(draft.law)
        log_q = jnp.take_along_axis(log_q, draft.tokens[:, :, None], -1)[:, :, 0]
        worth = jnp.cumsum(log_q, axis=1)
        least = jnp.sort(worth.reshape(-1))[-total]
        return draft._replace(count=(worth >= least).sum(1)), state

    return proposer._replace(propose=propose)


def chi_square(proposer, params):
    decoder = speculate(on_lm(LM), proposer, 3)
    drawn = spec.counts(decoder, (PARAMS[0], params), PROMPT, 3, ROWS)
    return spec.chi_square(drawn, spec.target_joint(LM, PARAMS[0], PROMPT, 3))


def test_every_row_keeps_its_law():
    """All rows of a run share one budget of one and a half tokens each."""
    total = 3 * ROWS // 2
    rule = budget(total, 3)
    found, limit = chi_square(draft_lm(LM, 3, stopping=rule), (PARAMS[1], ()))
    assert found < limit
    found, limit = chi_square(cut(draft_lm(LM, 3), total), PARAMS[1])
    assert found > 2 * limit


def test_the_run_depends_on_the_batch():
    """Which is why it says so; enough for all makes it the run of the draft alone."""
    prompts = [[i, j] for i in range(4) for j in range(4)]

    def run(proposer, params, chosen):
        decoder = speculate(on_lm(LM), proposer, 12)
        key = jax.random.key(5)  # row b of any batch has the same key
        found = decode.run(decoder, (PARAMS[0], params), *decode.pad(chosen), key)
        return [spec.new_tokens(found, row) for row in range(4)], found.info

    def tokens(rule, chosen):
        return run(draft_lm(LM, 3, stopping=rule), (PARAMS[1], ()), chosen)

    tight, info = tokens(budget(20, 3), prompts)
    alone, _ = tokens(budget(20, 3), prompts[:4])
    assert tight != alone
    assert int(info.drafted.sum()) <= 20 * int(info.calls.max())
    plain, _ = run(draft_lm(LM, 3), PARAMS[1], prompts)
    assert tokens(budget(48, 3), prompts)[0] == plain
    assert run(draft_lm(LM, 3), PARAMS[1], prompts[:4])[0] == plain


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="total = 0"):
        budget(0, 4)
    with pytest.raises(ValueError, match=r"length = 2\.0"):
        budget(3, 2.0)
