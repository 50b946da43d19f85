"""Oracles for speculative decoding: joint laws by enumeration, and chi-square."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import decode, law, stop, warp
from collab_jax.cooperate.efficient import coupled, verify
from collab_jax.cooperate.efficient.draft import Draft, Proposer
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.models import table

VOCAB = 5
LM = table.language_model(2)
KEYS = jax.random.split(jax.random.key(3))
PARAMS = tuple(table.init(key, VOCAB, 2, scale=1.5) for key in KEYS)
NEAR = (PARAMS[0], PARAMS[0] + 0.4 * PARAMS[1])  # a draft that is often right
WARPED = warp.warp(LM, warp.repetition_penalty(1.4), warp.top_p(0.95))
VERIFIERS = {
    "maximal": verify.maximal,
    "block": verify.block,
    "gumbel": coupled.gumbel,
}
PROMPTS = [[1], [2, 3, 4, 0, 1, 1, 2], [0, 4, 4], [3, 3], [1, 2, 3, 4], [0], [4, 0]]
AUTOMATON = stop.automaton(["abc", "cc"], [b"a", b"b", b"c", b"ab", b""])


def copies(size):
    """Proposes the tokens that stand at the front of the text: no LM, no law."""

    def propose(params, state, tokens, length, key):
        del params, key
        count = jnp.minimum(length % (size + 1), length)  # of every length, 0 as well
        return Draft(tokens[:, :size], count), state

    return Proposer(
        lambda *_: (), propose, lambda params, state, verified: state, size, size
    )


def rounds(verifier, new=12, size=3, target=WARPED, draft=WARPED, **rest):
    return speculate(
        on_lm(target, chunk=3),
        draft_lm(draft, size, chunk=3),
        new,
        verifier=verifier,
        **rest,
    )


def strings(vocab, length):
    """All strings of a length, in lexical order, `[V ** length, length]`."""
    found = [*itertools.product(range(vocab), repeat=length)]
    return np.array(found, np.int32).reshape(vocab**length, length)


def target_joint(lm, params, prompt, count):
    """The law of the next `count` tokens, `[V] * count`, by plain extension."""

    def log_probs(params, text):
        out, _ = lm.extend(params, lm.init(params, *text.shape), text)
        log_p = law.log_probs(out.logits[:, len(prompt) - 1 : -1])
        here = jnp.take_along_axis(log_p, text[:, len(prompt) :, None], 2)
        return here[:, :, 0].sum(1)

    vocab = jax.eval_shape(
        lambda p: lm.extend(p, lm.init(p, 1, 1), jnp.zeros((1, 1), int))[0], params
    ).logits.shape[-1]
    text = strings(vocab, count)
    text = np.concatenate([np.tile(prompt, (len(text), 1)), text], axis=1)
    joint = np.exp(np.asarray(jax.jit(log_probs)(params, text), np.float64))
    return joint.reshape((vocab,) * count)


def speculative_joints(
    verifiers, lms, params, prompt, size, count, vocab, stop_at=None, propose=None
):
    """The law of the next `count` tokens of the rounds, every draft enumerated.

    The rows are all drafts behind all texts that a round can begin with; they are read
    in one batch, through the targets' own extend and rewind.

    Args:
      verifiers: name -> `outcomes`.
      lms: target and draft.
      params: of both.
      prompt: one prompt.
      size: K.
      count: how many tokens.
      vocab: V.
      stop_at: from drafts and their log-probs [rows, K] to the count of each.
      propose: from the draft's logits [rows, K, V] to (logits of the law that the
        tokens are really drawn from, logits of the law that is reported, or None).

    Returns:
      name -> `[V] * count`.
    """
    tails = [tail.tolist() for n in range(count) for tail in strings(vocab, n)]
    drafts = strings(vocab, size)
    texts = [[*prompt, *tail] for tail in tails for _ in drafts]
    x = jnp.asarray(np.tile(drafts, (len(tails), 1)))
    text, length = decode.pad(texts)

    def read(lm, params):
        """Logits behind each text and each token of its draft."""
        target = on_lm(lm, chunk=2)
        state = target.init(params, text, length, 2 + 2 * size)
        pending = jnp.take_along_axis(text, length[:, None] - 1, 1)[:, 0]
        junk = Draft((x + 1) % vocab, length)  # more than is needed, and back
        state = target.score(params, state, junk, pending)[1]
        state = target.rewind(state, jnp.full(len(texts), 1 + size))
        return target.score(params, state, Draft(x, length), pending)[0].logits

    def program(params):
        p, q = (read(lm, own) for lm, own in zip(lms, params, strict=True))
        drawn, reported = (
            2 * (q[:, :size],) if propose is None else propose(q[:, :size])
        )
        log_q = law.log_probs(drawn)
        log_q = jnp.take_along_axis(log_q, x[:, :, None], 2)[:, :, 0]
        stops = jnp.full(len(texts), size) if stop_at is None else stop_at(x, log_q)
        draft = Draft(x, stops.astype(jnp.int32), reported)
        return log_q.sum(1), {k: f(p, draft) for k, f in verifiers.items()}

    log_q, laws = jax.jit(program)(params)
    weight = np.exp(np.asarray(log_q, np.float64))[:, None, None]
    shape = len(tails), len(drafts), size + 1, vocab
    return {
        name: _joined(tails, drafts, (np.asarray(z) * weight).reshape(shape), count)
        for name, z in laws.items()
    }


def _joined(tails, drafts, found, count):
    """Rounds follow rounds until `count` tokens stand."""
    vocab, joints = found.shape[-1], {}
    for i, tail in reversed([*enumerate(tails)]):
        left = count - len(tail)
        joint = np.zeros((vocab,) * left)
        for j, text in enumerate(drafts.tolist()):
            for a in range(found.shape[2]):
                if a >= left:
                    joint[tuple(text[:left])] += found[i, j, a].sum()
                    continue
                for v in range(vocab):
                    new = (*text[:a], v)
                    rest = joints[(*tail, *new)] if a + 1 < left else 1.0
                    joint[new] += found[i, j, a, v] * rest
        joints[tuple(tail)] = joint
    return joints[()]


def accepted(outcomes, p, q, size):
    """Law of the number of accepted tokens, `[K + 1]`, every draft enumerated.

    p is `[K + 1, V]` and q `[K, V]` probabilities that do not depend on the draft.
    """
    x = strings(p.shape[-1], size)
    weight = np.prod([q[i, x[:, i]] for i in range(size)], axis=0)
    tile = lambda z: jnp.log(jnp.tile(jnp.asarray(z)[None], (len(x), 1, 1)))  # noqa: E731
    draft = Draft(jnp.asarray(x), jnp.full(len(x), size), tile(q))
    found = np.asarray(outcomes(tile(p), draft), np.float64).sum(-1)
    return (weight[:, None] * found).sum(0)


def draws(decoder, params, prompts=PROMPTS, seed=5, **rest):
    """A run with keys of its own for every row."""
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    return decode.run(decoder, params, *decode.pad(prompts, **rest), keys)


def new_tokens(result, row):
    begin, end = int(result.prompt_length[row]), int(result.length[row])
    return np.asarray(result.tokens)[row, begin:end].tolist()


def check_resumes(decoder, params, prompts):
    """Two rounds, then a run from their text, give the tokens of one run."""
    whole = draws(decoder, params, prompts)
    keys = jax.random.split(jax.random.key(5), len(prompts))
    state = jax.jit(decoder.init)(params, *decode.pad(prompts), keys)
    step = jax.jit(decoder.step)
    state = step(params, step(params, state))
    texts = [
        np.asarray(state.tokens)[b, : int(state.length[b])].tolist()
        for b in range(len(prompts))
    ]
    again = draws(decoder, params, texts)
    for row in range(len(prompts)):
        cut = int(state.length[row] - whole.prompt_length[row])
        rest = new_tokens(whole, row)[cut:]
        assert new_tokens(again, row)[: len(rest)] == rest


def counts(decoder, params, prompt, tokens, runs, seed=1):
    """How often each continuation of `tokens` tokens was drawn, by index."""
    prompts, length = decode.pad([list(prompt)] * runs)
    result = decode.run(decoder, params, prompts, length, jax.random.key(seed))
    begin = len(prompt)
    return np.asarray(result.tokens)[:, begin : begin + tokens]


def chi_square(drawn, joint):
    """(statistic, limit): rare bins merged, ten standard deviations allowed."""
    expected = joint * len(drawn)
    found = np.zeros_like(expected)
    np.add.at(found, tuple(drawn.T), 1)
    common = expected >= 5
    total = ((found - expected)[common] ** 2 / expected[common]).sum()
    rest, seen = expected[~common].sum(), found[~common].sum()
    total += (seen - rest) ** 2 / max(rest, 1)
    freedom = common.sum()
    return total, freedom + 10 * np.sqrt(2 * freedom)
