"""DeePEn: members meet in a space of similarities to tokens that all of them have.

A token is represented by how near it lies to A anchors in its model's embedding, as a
law over the anchors; a model's next-token law by the mean of its tokens' laws. These
laws can be averaged, as the anchors are the same for all members. The first member's
law is then changed until it has the average as its representation.

Shapes: N members, U tokens of one, V of the first, D width of an embedding, A anchors,
C rows of a block; `...` any leading axes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from collab_jax.combine import product
from collab_jax.ensemble.vocabulary.union import check_bridges
from collab_jax.law import best, log_probs
from collab_jax.lm import LM
from collab_jax.pool import Pool, mixture
from collab_jax.translate import Bridge, spelled


class Relative(NamedTuple):
    """A model's tokens relative to anchors: a tree of arrays, made before jit.

    It may be a tracer: give it to the compiled function as an argument.
    """

    rows: jax.Array  # [U, D], of length 1
    anchors: jax.Array  # [A, D], of length 1
    scale: float | jax.Array = 100.0  # how much of a token's law lies near it


# of a model: R itself, `[U, A]`, see `matrix`; or what it is made of, where R would not
# fit into memory
Space = Relative | jax.Array


def relative(
    embedding: jax.Array, anchors: np.ndarray, scale: float | jax.Array = 100.0
) -> Relative:
    """The tokens of a model, and its tokens for the anchors.

    Args:
      embedding: `[U, D]`, of the model's input.
      anchors: `[A]` ints, a column of `common_tokens`.
      scale: the law of a token over the anchors is the sharper, the larger this is.

    Raises:
      ValueError: for anchors that are not there.

    >>> relative(jnp.array([[3.0, 4.0], [0.0, 2.0]]), np.array([1])).rows.tolist()
    [[0.6, 0.8], [0.0, 1.0]]
    """
    at = np.asarray(anchors)
    if not at.size or at.min() < 0 or at.max() >= len(embedding):
        raise ValueError(
            f"anchors {at.tolist()[:3]} ... in an embedding of {len(embedding)} rows: "
            "at least one token is expected, each below this"
        )
    rows = jnp.asarray(embedding, jnp.float32)
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows / jnp.where(length == 0, 1, length)
    return Relative(rows, rows[at], scale)


def common_tokens(
    bridges: Sequence[Bridge], count: int | None = 4096, seed: int = 0
) -> np.ndarray:
    """Tokens that every member has, `[A, N]`: the number of each in every member.

    Args:
      bridges: N, from the tokens of the text to those of each member.
      count: A at most, drawn without return; None for all, as in the paper.
      seed: of the draw.

    Raises:
      ValueError: where no token is common.

    >>> from collab_jax.translate import from_spellings
    >>> same, other = from_spellings([[0], [1]], 2), from_spellings([[1], [0, 0]], 2)
    >>> common_tokens([same, other]).tolist()
    [[0, 1]]
    """
    check_bridges(len(bridges), bridges)
    shared = np.all([np.asarray(b.shared()) for b in bridges], axis=0)
    at = np.flatnonzero(shared)
    if not len(at):
        raise ValueError("no token is common to all members: there are no anchors")
    if count is not None and count < len(at):
        drawn = np.random.default_rng(seed).choice(at, count, replace=False)
        at = np.sort(drawn)
    return np.stack([np.asarray(b.spelling)[at, 0] for b in bridges], axis=1)


def matrix(space: Relative) -> jax.Array:
    """The representations of a model's tokens, as one matrix, `[U, A]`.

        R[u] = softmax_a(scale * r_u / |r_u|),   r_u[a] = cos(e_u, e_anchor[a])

    Made once, it is the faster space, where there is memory for it.

    Args:
      space: of the model.

    Source: arXiv 2404.12715; the length of r and the scale are its authors' code's.

    >>> matrix(relative(jnp.eye(2), np.array([0, 1]), scale=1.0)).round(3).tolist()
    [[0.731, 0.269], [0.269, 0.731]]
    """
    near = jnp.matmul(space.rows, space.anchors.T, precision=jax.lax.Precision.HIGHEST)
    length = jnp.linalg.norm(near, axis=-1, keepdims=True)
    near = near / jnp.where(length == 0, 1, length)
    return jax.nn.softmax(space.scale * near, axis=-1)


def _whole(space: Space) -> jax.Array:
    return matrix(space) if isinstance(space, Relative) else space


def represent(probs: jax.Array, space: Space, block: int = 1024) -> jax.Array:
    """The representation of a law, `probs R`, `[..., A]`.

    Args:
      probs: `[..., U]`.
      space: of the model.
      block: C, rows of R that exist at a time where it has to be made.

    >>> space = relative(jnp.eye(3), np.array([0, 1]))
    >>> probs = jnp.array([0.5, 0.2, 0.3])
    >>> represent(probs, space, block=2).round(3).tolist()
    [0.65, 0.35]
    >>> represent(probs, matrix(space)).round(3).tolist()
    [0.65, 0.35]
    """
    if not isinstance(space, Relative):
        return probs @ space
    rows = _blocks(space.rows, 0, block)  # [U / C, C, D]
    weights = jnp.moveaxis(_blocks(probs, probs.ndim - 1, block), -2, 0)

    @jax.checkpoint
    def add(total, piece):
        some, weight = piece
        return total + weight @ matrix(space._replace(rows=some)), None

    start = jnp.zeros((*probs.shape[:-1], space.anchors.shape[0]), probs.dtype)
    return jax.lax.scan(add, start, (rows, weights))[0]


def _returned(ratio: jax.Array, space: Space, block: int) -> jax.Array:
    """`R ratio`, `[..., U]`: the transpose of `represent`."""
    if not isinstance(space, Relative):
        return ratio @ space.T

    @jax.checkpoint
    def some(rows):
        return ratio @ matrix(space._replace(rows=rows)).T

    found = jax.lax.map(some, _blocks(space.rows, 0, block))  # [U / C, ..., C]
    found = jnp.moveaxis(found, 0, -2)
    found = found.reshape(*ratio.shape[:-1], -1)
    return found[..., : space.rows.shape[0]]


def _blocks(x: jax.Array, axis: int, block: int) -> jax.Array:
    """An axis as blocks of equal length, filled up with zeros."""
    size = x.shape[axis]
    count = -(-size // block)
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, count * block - size)
    shape = (*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.pad(x, fill).reshape(shape)


def deepen(
    spaces: Sequence[Space],
    *weights: float | jax.Array,
    steps: int = 5,
    rate: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    block: int = 1024,
    end: int | None = None,
) -> Pool:
    """The pool of DeePEn, over members of unequal vocabularies.

    The representations are averaged, and the first member's law p is changed in `steps`
    steps, such that its own representation comes near the average:

        r = sum_n w[n] p_n R_n,   L = KL(r || p R_0)
        p[v] <- p[v] (-dL/dp[v])^rate,   -dL/dp[v] = sum_a R_0[v, a] r[a] / (p R_0)[a]

    A token gains when the average is nearer to it than p is. At rate 1 these are the
    steps of expectation maximisation: no step raises L, p stays a law, a model with
    itself stays as it is, and a step takes at most the share `1 - w[0]` of what a token
    had. The paper adds the slope itself, `z <- z - rate dL/dp`, which has no bound: of
    real vocabularies it makes logits of 10^20. The authors' code takes five steps of
    AdamW in the logits, whose length does not shrink with the slope; that is

        optax.adamw(optax.cosine_decay_schedule(rate, steps, 0.25), weight_decay=0.01)

    with a rate of 0.05 to 0.5, tuned on other texts.

    A member's -inf is probability 0; what the first member forbids stays forbidden.

    Args:
      spaces: N, with the same anchors; the first is the text's model's.
      *weights: one number >= 0 a member, of sum 1; none for equal weights.
      steps: 0 leaves the first member as it is.
      rate: length of a step of expectation maximisation.
      optimizer: takes the steps in the logits instead, down `L / A`; None for
        expectation maximisation.
      block: rows of R that exist at a time for a space that is not R itself, so that no
        `[U, A]` array does; every step makes them anew, twice.
      end: end-of-text token; where the first member's best token is this one, its law
        is left as it is, as in the authors' code.

    Raises:
      ValueError: for unequal numbers of anchors, negative steps, a block of no rows or
        negative weights; when called, for members or weights that do not fit.

    Source: arXiv 2404.12715.

    >>> first = relative(jnp.eye(2), np.array([0, 1]))
    >>> second = relative(jnp.eye(3)[:, ::-1], np.array([2, 1]))  # the second's 2 is 0
    >>> z = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.1, 0.1, 0.8]))
    >>> jax.nn.softmax(deepen([first, second])(z)).round(1).tolist()
    [0.7, 0.3]
    """
    made = [jax.eval_shape(_whole, space).shape for space in spaces]
    sizes, counts = [u for u, _ in made], [a for _, a in made]
    if len(set(counts)) != 1:
        raise ValueError(f"spaces of {counts} anchors: the same are expected for all")
    if steps < 0 or block < 1:
        raise ValueError(
            f"steps = {steps}, block = {block}: at least 0 steps and 1 row are expected"
        )
    mixture(*weights)  # refuses negative ones

    def pool(members):
        count = len(members)
        share = weights or (1.0 / count,) * count
        found = [z.shape[-1] for z in members]
        if found != sizes or len(share) != count:
            raise ValueError(
                f"members of {found} tokens with {len(share)} weights for spaces of "
                f"{sizes}: one space and one weight each are expected, made of the "
                "embedding of this model"
            )
        own = [
            represent(jnp.exp(log_probs(z)), space, block)
            for z, space in zip(members, spaces, strict=True)
        ]
        wanted = sum(w * r for w, r in zip(share, own, strict=True))
        first = log_probs(members[0])
        forbidden = jnp.isneginf(first)

        def step(z, _):
            probs = jnp.where(forbidden, 0.0, jnp.exp(log_probs(z)))
            now = represent(probs, spaces[0], block)
            ratio = wanted / jnp.where(now == 0, 1.0, now)  # what p cannot reach: 0
            ratio = jnp.where(now == 0, 0.0, ratio)
            gain = _returned(ratio, spaces[0], block)
            gain = jnp.maximum(gain, jnp.finfo(gain.dtype).tiny)
            return jnp.where(forbidden, -jnp.inf, z + rate * jnp.log(gain)), None

        if optimizer is None:
            result, _ = jax.lax.scan(step, first, length=steps)
        else:
            result = _optimised(optimizer, steps, first, wanted, spaces[0], block)
        if end is None:
            return result
        over = best(first)[..., None] == end
        return jnp.where(over, first, result)

    return pool


def _optimised(optimizer, steps: int, first, wanted, space: Space, block: int):
    """Logits after steps of an optimiser; what is -inf stays so."""
    forbidden = jnp.isneginf(first)

    def loss(z):
        z = log_probs(jnp.where(forbidden, -jnp.inf, z))
        now = represent(jnp.where(forbidden, 0.0, jnp.exp(z)), space, block)
        seen = now > 0
        apart = wanted * jnp.log(jnp.where(seen, now, 1.0))
        return -jnp.where(seen, apart, 0.0).sum() / wanted.shape[-1]

    def step(carry, _):
        z, state = carry
        updates, state = optimizer.update(jax.grad(loss)(z), state, z)
        return (optax.apply_updates(z, updates), state), None

    start = jnp.where(forbidden, 0.0, first)
    (z, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return jnp.where(forbidden, -jnp.inf, z)


def deepen_lm(
    members: Sequence[LM],
    bridges: Sequence[Bridge],
    spaces: Sequence[Space],
    *weights: float | jax.Array,
    steps: int = 5,
    rate: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    block: int = 1024,
    end: int | None = None,
    ratio: float = 2.0,
) -> LM:
    """An ensemble in the space of similarities to common tokens, see `deepen`.

    Args:
      members: N LMs, each over its own vocabulary; the text stands in the first's.
      bridges: N, from the first member's tokens to those of each, its own included.
      spaces: N, of `relative` or `matrix`.
      *weights: one number >= 0 a member, of sum 1; none for equal weights.
      steps: see `deepen`.
      rate: likewise.
      optimizer: likewise.
      block: likewise.
      end: likewise.
      ratio: room of each member, see `translate.spelled`.

    Returns:
      An LM over the first member's tokens, whose parameters are the tuple of the
      members'.

    Raises:
      ValueError: as `deepen` and `translate.spelled`.

    Source: arXiv 2404.12715.

    >>> from collab_jax.models import table
    >>> from collab_jax.translate import from_spellings
    >>> same = from_spellings([[0], [1]], 2)
    >>> space = relative(jnp.eye(2), np.array([0, 1]))
    >>> lm = deepen_lm([table.language_model(0)] * 2, [same] * 2, [space] * 2)
    >>> params = (jnp.log(jnp.array([[0.8, 0.2]])),) * 2
    >>> out, _ = lm.extend(params, lm.init(params, 1, 2), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits[0, 0]).round(3).tolist()
    [0.8, 0.2]
    """
    check_bridges(len(members), bridges)
    parts = zip(members, bridges, strict=True)
    law = deepen(
        spaces,
        *weights,
        steps=steps,
        rate=rate,
        optimizer=optimizer,
        block=block,
        end=end,
    )
    return product([spelled(lm, bridge, ratio) for lm, bridge in parts], law)
