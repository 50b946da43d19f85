"""Speculation with a transformer's cache: rows alone or together, and no copies."""

import jax
from compiled import for_users
from speculation import new_tokens
from test_speculate_models import BIG, CONFIG, KEY, MODEL, PROMPTS, SMALL, WARPS

from collab_jax import decode, warp
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm

NEW = 16


def test_a_row_does_not_depend_on_its_batch_or_padding():
    """Block verification: the run itself is that of the row alone."""
    target = warp.warp(MODEL, *WARPS)
    decoder = speculate(on_lm(target, chunk=8), draft_lm(target, 3, chunk=8), NEW)
    keys = jax.random.split(KEY, len(PROMPTS))
    prompt, length = decode.pad(PROMPTS)
    together = decode.run(decoder, (BIG, SMALL), prompt, length, keys)
    program = decode.compile(lambda _: decoder)
    for row, one in enumerate(PROMPTS):
        prompt, length = decode.pad([one], multiple=32)
        alone = program(None, (BIG, SMALL), prompt, length, keys[row : row + 1])
        assert new_tokens(together, row) == new_tokens(alone, 0)


def growth(target):
    """Bytes of working memory of the loop for every slot of capacity."""
    found = []
    for new in (1000, 2000):
        decoder = speculate(target, draft_lm(MODEL, 3), new)
        start = jax.eval_shape(decoder.init, (BIG, SMALL), *decode.pad(PROMPTS), KEY)

        def loop(params, state, decoder=decoder):
            return jax.lax.while_loop(
                lambda state: ~state.done.all(),
                lambda state: decoder.step(params, state),
                state,
            )

        lowered = jax.jit(loop, donate_argnums=1).lower((BIG, SMALL), start)
        found.append(for_users(lowered).memory_analysis().temp_size_in_bytes)
    return (found[1] - found[0]) / 1000


def test_the_loop_copies_no_cache():
    """Its working memory grows by the attention scores, and by no second cache."""
    right = on_lm(MODEL)
    layer = len(PROMPTS) * CONFIG.kv_heads * CONFIG.head_size * 4
    scores = len(PROMPTS) * CONFIG.heads * 4 * 4  # of the four tokens of a draft
    assert growth(right) < 3 * scores + layer / 2

    def twice(params, state, draft, pending):
        """The control: two calls on one state need two states."""
        other = draft._replace(tokens=draft.tokens[:, ::-1])
        state = right.score(params, state, other, pending)[1], state
        return right.score(params, state[1], draft, pending)[0], state[0]

    assert growth(right._replace(score=twice)) > growth(right) + layer
