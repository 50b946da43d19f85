"""What is asked of every composite: likelihoods under many knobs in one trace, and the
same greedy text as the target of speculative decoding.

Shapes: K knobs, B rows, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from joining.report import Verdict
from speculating.same import TIE, part
from speculating.subject import texts

from collab_jax import decode, score
from collab_jax.cooperate.efficient import exact, ngram
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import LM


def argued(make: Callable[[Any], LM], example: Any) -> LM:
    """An LM whose parameters are (what it is made of, those of `make(that)`).

    So bridges and knobs are arguments of a compiled function, not constants in it.

    Args:
      make: of arrays.
      example: such arrays.
    """
    plain = make(example)  # what needs no parameters needs no arrays either

    def verb(name: str) -> Callable:
        def call(params, *rest):
            return getattr(make(params[0]), name)(params[1], *rest)

        return call

    return plain._replace(
        init=verb("init"), extend=verb("extend"), branch=verb("branch")
    )


def swept(make: Callable[[Any, Any], LM], chunk: int = 32) -> Callable[..., jax.Array]:
    """Log-probs of texts under every knob, as one program and one pass of the models.

    Args:
      make: from one knob and the parts that all knobs share to an LM.
      chunk: tokens whose logits exist at a time.

    Returns:
      A jitted function of (knobs `[K, ...]`, parts, params, tokens `[B, T]`, length
      `[B]`) that gives `[K, B, T]` log-probs.
    """

    def one(knob, parts, params, tokens, length):
        lm = make(knob, parts)
        return score.score(lm, params, tokens, length, chunk).logprob

    return jax.jit(jax.vmap(one, in_axes=(0, None, None, None, None)))


def as_target(
    lm: LM,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    eos: Sequence[int] = (),
    proposer: Proposer | None = None,
    own: Any = (),
) -> dict[str, Any]:
    """The greedy text of an LM, plain and with drafts, and where the two are apart.

    Args:
      lm: any LM.
      params: its parameters.
      prompts: of the rows.
      new: new tokens.
      eos: tokens that end a row.
      proposer: what drafts; the longest and latest n-gram of the text, if None.
      own: its parameters.
    """
    prompt, length = decode.pad(prompts)
    key, ends = jax.random.key(0), {"eos": tuple(eos)}
    drafts = ngram.ngram(4) if proposer is None else proposer
    decoder = speculate(on_lm(lm), drafts, new, verifier=exact.greedy(), **ends)
    greedy = decode.compile(lambda _: decode.greedy(lm, new, **ends))
    plain = greedy(None, params, prompt, length, key)
    drafted = decode.compile(lambda _: decoder)(
        None, (params, own), prompt, length, key
    )
    expected, found = (texts(x, len(prompts)) for x in (plain, drafted))
    steps = [part(*both) for both in zip(found, expected, strict=True)]
    apart = []
    if any(step is not None for step in steps):
        at = length + jnp.array([step or 0 for step in steps])
        gaps = np.asarray(_margins(lm)(params, plain.tokens, at))
        apart = [
            {"row": b, "step": s, "margin": float(gaps[b]), "tie": bool(gaps[b] < TIE)}
            for b, s in enumerate(steps)
            if s is not None
        ]
    return {
        "rows": len(prompts),
        "tokens": sum(map(len, found)),
        "calls": int(np.asarray(drafted.info.calls).sum()),
        "apart": apart,
    }


def _margins(lm: LM) -> Callable[..., jax.Array]:
    """How far the two best tokens lie apart behind the first `length[b]` tokens."""

    def read(params, tokens, length):
        state, _ = decode.start(lm, params, tokens, length, 1, 128)
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
        best, _ = jax.lax.top_k(lm.extend(params, state, last)[0].logits[:, 0], 2)
        return best[:, 0] - best[:, 1]

    return jax.jit(read)


def equal_rows(report: dict[str, Any]) -> int:
    """Rows with the plain text, up to ties that are shown."""
    return report["rows"] - sum(not gap["tie"] for gap in report["apart"])


def same_with_drafts(expected: str, report: dict[str, Any], more: str = "") -> Verdict:
    """Whether greedy text was the same with drafts in every row.

    Args:
      expected: that it is, of what.
      report: of `as_target`.
      more: what else was seen.
    """
    same = equal_rows(report)
    return Verdict(
        expected, f"{same} of {report['rows']} rows{more}", same == report["rows"]
    )
