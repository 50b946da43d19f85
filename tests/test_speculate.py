"""The speculative loop as a run: plain sampling, greedy, rows, resuming, endings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import (
    AUTOMATON,
    LM,
    NEAR,
    PARAMS,
    PROMPTS,
    VERIFIERS,
    WARPED,
    check_resumes,
    copies,
    draws,
    new_tokens,
    rounds,
)

from collab_jax import decode, law, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.stopping import confidence
from collab_jax.cooperate.efficient.target import on_lm


def plain(lm=WARPED, new=12, **rest):
    return decode.sample(lm, new, chunk=3, **rest)


def same(mine, theirs):
    assert (mine.length == theirs.length).all()
    for row in range(len(mine.length)):
        assert new_tokens(mine, row) == new_tokens(theirs, row)


@pytest.mark.parametrize("ends", [{}, {"eos": [4], "stop": AUTOMATON}])
def test_coupled_runs_are_plain_sampling(ends):
    """Token for token, whoever drafts, and wherever a row ends."""
    expected = draws(plain(**ends), PARAMS[0])
    for params, draft in (
        (NEAR, draft_lm(WARPED, 4)),
        (PARAMS, draft_lm(warp.warp(LM, warp.greedy()), 2)),
        (PARAMS, draft_lm(LM, 2, greedy=True)),
        ((PARAMS[0], (NEAR[1], ())), draft_lm(LM, 3, stopping=confidence(0.5))),
        ((PARAMS[0], ()), copies(3)),
    ):
        decoder = speculate(on_lm(WARPED), draft, 12, verifier=coupled.gumbel(), **ends)
        same(draws(decoder, params), expected)
    assert len({*np.asarray(expected.length - expected.prompt_length)}) > 1 or not ends


@pytest.mark.parametrize("whole", [False, True])
def test_a_greedy_draft_is_that_of_a_greedy_warp(whole):
    best = warp.warp(LM, warp.greedy())
    warped = draft_lm(best, 3, chunk=3, whole=whole)
    greedy = draft_lm(LM, 3, chunk=3, greedy=True, whole=whole)
    results = [
        draws(speculate(on_lm(LM), draft, 12, verifier=verify.block()), PARAMS)
        for draft in (warped, greedy)
    ]
    same(*results)
    for one, other in zip(*(result.info for result in results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_greedy_draft_stops_where_its_lm_is_not_sure():
    """Behind a warp that leaves one token the rule sees certainty, and never stops."""
    tokens, length = decode.pad(PROMPTS)
    wide = jnp.pad(tokens, ((0, 0), (0, 4)))
    key = law.row_keys(jax.random.key(0), len(PROMPTS))

    def drafted(lm, **rest):
        draft = draft_lm(lm, 4, stopping=confidence(0.6), **rest)
        params = PARAMS[1], ()
        state = draft.init(params, tokens, length, 4)
        return draft.propose(params, state, wide, length, key)[0]

    draft = drafted(LM, greedy=True)
    never = drafted(warp.warp(LM, warp.greedy()))
    assert draft.law is None
    assert never.count.tolist() == [4] * len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text, count = list(prompt), 0
        while count < 4:
            out, _ = LM.extend(
                PARAMS[1], LM.init(PARAMS[1], 1, len(text)), jnp.array([text])
            )
            q = np.asarray(jax.nn.softmax(out.logits[0, -1]))
            assert int(draft.tokens[row, count]) == q.argmax()
            text.append(int(q.argmax()))
            count += 1
            if q.max() < 0.6:
                break
        assert int(draft.count[row]) == count
    assert len({*draft.count.tolist()}) > 1


def test_coupled_drafts_agree_more_often():
    """The noise of the target helps the draft; other noise leaves the text alone."""
    apart = coupled.gumbel()._replace(coupled=False)
    result = [draws(rounds(v), NEAR) for v in (coupled.gumbel(), apart)]
    same(*result)
    assert result[0].info.accepted.sum() > 1.3 * result[1].info.accepted.sum()


@pytest.mark.parametrize("name", VERIFIERS)
def test_greedy_targets_give_greedy_text(name):
    """The greedy warp makes both laws one-hot; a sampled draft changes nothing."""
    expected = draws(decode.greedy(WARPED, 12, eos=[4]), PARAMS[0])
    best = warp.warp(WARPED, warp.greedy())
    new = (expected.length - expected.prompt_length).sum()
    calls = []
    for draft in (best, WARPED):
        decoder = rounds(VERIFIERS[name](), 12, 4, best, draft, eos=[4])
        found = draws(decoder, NEAR)
        same(found, expected)
        calls.append(found.info.calls.sum())
    assert calls[0] <= calls[1] < new


def least(verifier):
    """The mistake: every row is cut to the least count of the batch."""

    def verify_(*arguments):
        found = verifier.verify(*arguments)
        accepted = jnp.broadcast_to(found.accepted.min(), found.accepted.shape)
        return found._replace(accepted=accepted, count=accepted + 1)

    return verifier._replace(verify=verify_)


def alone_or_together(verifier):
    decoder = rounds(verifier, eos=[4])
    together = draws(decoder, NEAR)
    program = decode.compile(lambda _: decoder)
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        padded = decode.pad([prompt], multiple=16)
        alone = program(None, NEAR, *padded, keys[row : row + 1])
        yield new_tokens(together, row), new_tokens(alone, 0)


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_row_does_not_depend_on_its_batch_or_padding(name):
    assert all(a == b for a, b in alone_or_together(VERIFIERS[name]()))


def test_a_uniform_count_is_seen():
    assert not all(a == b for a, b in alone_or_together(least(verify.block())))


@pytest.mark.parametrize("name", ["block", "gumbel"])
def test_a_run_resumes_between_rounds(name):
    decoder = rounds(VERIFIERS[name](), 12)
    check_resumes(decoder, NEAR, PROMPTS[1:3])


@pytest.mark.parametrize("name", ["block", "gumbel"])
def test_streaming_gives_the_same_tokens(name):
    decoder = rounds(VERIFIERS[name](), eos=[4])
    result = draws(decoder, NEAR)
    rows = [[] for _ in PROMPTS]
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    for piece in decode.stream(decoder, NEAR, *decode.pad(PROMPTS), keys):
        for row, tokens in zip(rows, piece, strict=True):
            row.extend(tokens)
    assert rows == [new_tokens(result, row) for row in range(len(PROMPTS))]


def test_rows_end_inside_a_block():
    """With the first token that ends them, and nothing behind it."""
    spelled = [b"a", b"b", b"c", b"ab", b""]
    decoder = speculate(on_lm(LM), draft_lm(LM, 5), 15, eos=[4], stop=AUTOMATON)
    prompt, length = decode.pad([[1]] * 64)
    result = decode.run(decoder, NEAR, prompt, length, jax.random.key(3))
    endings = set()
    for row in range(64):
        tokens = new_tokens(result, row)
        texts = [b"".join(spelled[t] for t in tokens[: n + 1]) for n in range(15)]
        stopped = [
            b"abc" in text or b"cc" in text or token == 4
            for text, token in zip(texts, tokens, strict=False)
        ]
        assert not any(stopped[:-1])
        assert stopped[-1] or len(tokens) == 15
        endings.add("eos" if tokens[-1] == 4 else "stop" if stopped[-1] else "limit")
    assert endings == {"eos", "stop", "limit"}


def naive_typical(prompt, new, size, epsilon, delta):
    """Typical acceptance of the drafts of `copies`, one token after the other."""

    def laws(text):
        tokens = jnp.asarray([text])
        out, _ = LM.extend(PARAMS[0], LM.init(PARAMS[0], 1, len(text)), tokens)
        return np.asarray(jax.nn.softmax(out.logits[0]), np.float64)

    text = list(prompt)
    while len(text) < len(prompt) + new:
        draft = text[:size][: min(len(text) % (size + 1), len(text))]
        read = laws([*text, *draft])[len(text) - 1 :]
        kept = []
        for p, token in zip(read, draft, strict=False):
            entropy = -(p * np.log(p)).sum()
            if p[token] <= min(epsilon, delta * np.exp(-entropy)):
                break
            kept.append(token)
        text += [*kept, int(np.argmax(read[len(kept)]))]
    return text[len(prompt) : len(prompt) + new]


def test_a_run_of_typical_acceptance_is_that_of_a_loop():
    """Lossy: it keeps what greedy decoding would not have taken."""
    decoder = speculate(on_lm(LM), copies(3), 12, verifier=verify.typical(0.2, 0.5))
    found = draws(decoder, (PARAMS[0], ()))
    greedy = draws(decode.greedy(LM, 12), PARAMS[0])
    apart = 0
    for row, prompt in enumerate(PROMPTS):
        assert new_tokens(found, row) == naive_typical(prompt, 12, 3, 0.2, 0.5)
        apart += new_tokens(found, row) != new_tokens(greedy, row)
    assert apart
