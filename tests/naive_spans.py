"""Searches over spans, written from their definitions over lists of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from transferring import log_softmax

from collab_jax import law


def chunk_search(base, grade, prompt, key, beams, lanes, size, new_tokens, eos=()):
    """Beams that are grown by drawn chunks: `[(grade, new tokens), ..]`, best first.

    Args:
      base: text -> logits `[V]`.
      grade: (prompt, new tokens) -> the grade of the whole continuation.
      key: of the row; lane c draws with `fold_in(key, c)`.
    """
    found = [(0.0, [], False)] * beams
    while not all(ended for _, _, ended in found):
        grown = []
        for w, (old, text, ended) in enumerate(found):
            if ended:
                grown.append((old, text, True))
                continue
            for k in range(lanes):
                own = jax.random.fold_in(key, w * lanes + k)
                new = list(text)
                for _ in range(size):
                    z = np.asarray(base(prompt + new))
                    place = jnp.array([len(prompt) + len(new)])
                    noise = np.asarray(law.noise(own[None], place, len(z)))[0]
                    new.append(int(np.argmax(z + noise)))
                    over = new[-1] in eos or len(new) == new_tokens
                    if over:
                        break
                grown.append((grade(prompt, new), new, over))
        found = sorted(grown, key=lambda one: -one[0])[:beams]
    return [(score, text) for score, text, _ in found]


def diver(base, say, prompt, ratio, lanes, size, new_tokens, farthest=False, eos=()):
    """DIVER's new tokens.

    Args:
      base: new tokens -> logits `[V]`.
      say: new tokens -> the log-prob of the source behind them, weighted.
    """

    def candidates(text):
        z = log_softmax(base(prompt + text))
        order = [int(v) for v in np.argsort(-z, kind="stable")]
        return [v for v in order if z[v] >= z.max() + np.log(ratio)], z

    def over(text):
        return text[-1] in eos or len(text) == new_tokens

    written = []
    while not written or not over(written):
        first, z = candidates(written)
        spans = [([v], z[v]) for v in first[:lanes]]
        met = [False] * len(spans)
        for _ in range(size - 1):
            live = [not over(written + span) for span, _ in spans]
            looked = [candidates(written + span) for span, _ in spans]
            met = [
                m or (a and len(one) > 1)
                for m, a, (one, _) in zip(met, live, looked, strict=True)
            ]
            waiting = [m or not a for m, a in zip(met, live, strict=True)]
            if (all(waiting) if farthest else any(met)) or not any(live):
                break
            spans = [
                ([*span, one[0]], score + law[one[0]]) if a else (span, score)
                for (span, score), (one, law), a in zip(
                    spans, looked, live, strict=True
                )
            ]
        grades = [score + say(written + span) for span, score in spans]
        written = written + spans[int(np.argmax(grades))][0]
    return written
