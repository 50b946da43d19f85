"""Beam search over lists of hypotheses, written from its definition."""

import itertools
import math

from collab_jax.beam import EarlyStopping


def search(
    log_probs,
    prompt,
    beams,
    new_tokens,
    penalty=1.0,
    early=False,
    eos=(),
    ends=lambda new: False,
    *,
    margins=None,
    whole_length=False,
    forgets_ended=False,
):
    """The beams that ended, best first: `[(penalised score, new tokens), ...]`.

    Args:
      log_probs: text (a list of tokens) -> the V log-probs of what follows.
      margins: a list that takes the gap of every decision that was made.
      whole_length, forgets_ended: known mistakes, for negative controls.
    """
    margins = [] if margins is None else margins
    running, ended = [(0.0, [])], []
    candidates = beams * max(2, 1 + len(eos))

    def penalised(score, count):
        return score / float(count + len(prompt) * whole_length) ** penalty

    for count in range(1, new_tokens + 1):
        every = [
            (score + step, [*text, token])
            for score, text in running
            for token, step in enumerate(log_probs(prompt + text))
            if step != -math.inf  # a forbidden text is none
        ]
        grown = sorted(every, key=lambda one: -one[0])[:candidates]
        over = [
            text[-1] in eos or ends(text) or count == new_tokens for _, text in grown
        ]
        if len(grown) > beams and over[beams - 1] != over[beams]:
            margins.append(grown[beams - 1][0] - grown[beams][0])
        for (score, text), finished in list(zip(grown, over, strict=True))[:beams]:
            if finished:
                ended.append((penalised(score, count), text))
        ended.sort(key=lambda one: -one[0])
        if len(ended) > beams:
            margins.append(ended[beams - 1][0] - ended[beams][0])
        ended = ended[:beams]
        if forgets_ended and count < new_tokens:
            ended = []
        running = [one for one, o in zip(grown, over, strict=True) if not o]
        if len(running) > beams:
            margins.append(running[beams - 1][0] - running[beams][0])
        running = running[:beams]
        if not running:
            break
        if len(ended) == beams:
            never = early in (EarlyStopping.NEVER, "never")
            reach = new_tokens if never and penalty > 0 else count
            hope = penalised(running[0][0], reach)
            if early is not True:
                margins.append(abs(hope - ended[-1][0]))
            if early is True or hope <= ended[-1][0]:
                break
    margins += [a[0] - b[0] for a, b in itertools.pairwise(ended)]
    return ended
