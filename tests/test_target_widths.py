"""Rounds as wide as what was drafted: the same run, and fewer tokens read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from compiled import for_users
from speculation import PARAMS, PROMPTS, VERIFIERS, WARPED, copies, draws, new_tokens

from collab_jax import decode
from collab_jax.cooperate.efficient import exact, ngram
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.growth import ranked
from collab_jax.cooperate.efficient.parallel import parallel
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models.parallel_heads import medusa

WIDTHS = 1, 3, 9


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_run_is_the_same(verifier):
    """Ragged drafts of 0 to 4 tokens, rows that end."""
    found = [
        draws(
            speculate(
                on_lm(WARPED, 3, widths),
                copies(4),
                12,
                verifier=VERIFIERS[verifier](),
                eos=(4,),
            ),
            (PARAMS[0], ()),
        )
        for widths in ((), WIDTHS)
    ]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    for plain, narrow in zip(*(result.info for result in found), strict=True):
        np.testing.assert_allclose(narrow, plain, atol=1e-6)


def test_no_more_is_read_than_was_drafted():
    model = small_model.model()
    target = on_lm(model.lm, 4, WIDTHS)
    prompt, length = decode.pad([[1, 2, 3], [4, 5]])
    state = target.init(model.params, prompt, length, 12)
    tokens, pending = jnp.array([[7, 8, 9, 1], [2, 3, 4, 5]]), jnp.array([3, 5])
    plain = on_lm(model.lm, 4)
    begin = plain.init(model.params, prompt, length, 12)
    for count, read in (([0, 0], 1), ([1, 0], 3), ([1, 2], 3), ([0, 3], 5)):
        draft = Draft(tokens, jnp.array(count))
        out, after = target.score(model.params, state, draft, pending)
        assert (after.inner.length - state.inner.length).tolist() == [read] * 2
        want, _ = plain.score(model.params, begin, draft, pending)
        np.testing.assert_allclose(
            out.logits[:, :read], want.logits[:, :read], atol=1e-4
        )
        kept = jnp.array(count) + 1  # the pending token and what was drafted
        back = target.rewind(after, 5 - kept)
        assert (back.inner.length - state.inner.length == kept).all()


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_hidden_states_and_trees_pass(shape):
    """What a draft reads of the target stands where it stood."""
    model, prompts = small_model.model(), [[7, 8, 9, 7, 8], [200]]
    heads = medusa(model.backbone, 3)
    params = model.params, (heads.init(jax.random.key(1), model.params), model.params)
    proposer, verifier = parallel(heads), exact.greedy()
    if shape == "tree":
        proposer = draft_tree(model.lm, ranked([(0,), (1,), (0, 0)]))
        params = model.params, model.params
    found = [
        draws(
            speculate(
                on_lm(model.lm, 4, widths), proposer, 12, verifier=verifier, eos=()
            ),
            params,
            prompts,
        )
        for widths in ((), (1, 2))
    ]
    for row in range(2):
        assert new_tokens(found[0], row) == new_tokens(found[1], row)
    np.testing.assert_array_equal(*(result.info.calls for result in found))


def test_the_cache_is_not_copied():
    """A round holds no copy of the cache's size, whatever its width."""
    model, capacity = small_model.model(), 4096
    prompt, length = decode.pad([PROMPTS[1]])
    counts = []
    for widths in ((), (1, 3)):
        decoder = speculate(on_lm(model.lm, 8, widths), ngram.ngram(6), capacity)
        params = model.params, ()
        state = jax.eval_shape(decoder.init, params, prompt, length, jax.random.key(0))

        def run(params, state, decoder=decoder):
            return jax.lax.fori_loop(
                0, 8, lambda _, state: decoder.step(params, state), state
            )

        lowered = jax.jit(run, donate_argnums=1).lower(params, state)
        text = for_users(lowered).as_text()
        leaves = [x for x in jax.tree.leaves(state.lm) if x.ndim == 4]
        sizes = {",".join(map(str, x.shape)) for x in leaves}
        moved = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text)
        counts.append(sum(shape in sizes for shape in moved))
    assert counts[1] <= counts[0]


def test_widths_are_checked():
    with pytest.raises(ValueError, match=r"widths = \(0, 2\): numbers from 1"):
        on_lm(WARPED, widths=(0, 2))
