"""Routed experts without dropping: every token is read by exactly its chosen experts.

What a token becomes depends on that token alone, whatever else is in the batch. A form
that sorts tokens by expert (`jax.lax.ragged_dot`) takes 1.5 to 4 times as long as the
dense one on CPU, and cannot be vmapped over stacked members.

Shapes: B rows, T tokens of this call, N = B T tokens, E experts, A active experts of a
token, W width, F width inside an expert.
Source: Mixtral of Experts, arXiv:2401.04088.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.models.linear import Kernel, Projection, contract, leaf, pick


class Experts(NamedTuple):
    """The weights of all experts of one layer."""

    gate: Kernel  # [E, W, F]
    up: Kernel  # [E, W, F]
    down: Kernel  # [E, F, W]


def route(
    logits: jax.Array, active: int, renormalise: bool, skipped: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The most probable experts of each token, and the weight of each.

    Args:
      logits: `[N, E]`, scores of the router.
      active: A.
      renormalise: whether the weights of the chosen experts sum to one.
      skipped: how many of the most probable experts are passed over.

    Returns:
      weights `[N, A]` float32 and experts `[N, A]` int32, most probable first.

    >>> weights, chosen = route(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), 2, True)
    >>> chosen.tolist(), weights.round(3).tolist()
    ([[1, 2]], [[0.625, 0.375]])
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, skipped + active)
    weights, chosen = weights[:, skipped:], chosen[:, skipped:]
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, chosen


def mix_dense(
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    chosen: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Every expert reads every token, the unchosen with weight zero.

    Args:
      x: `[N, W]`.
      experts: the weights.
      weights: `[N, A]`.
      chosen: `[N, A]`.
      activation: elementwise.

    Returns:
      `[N, W]`, `sum_a weights[n, a] expert[chosen[n, a]](x[n])`.

    >>> one = Experts(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
    >>> x, w = jnp.array([[3.0]]), jnp.array([[1.0]])
    >>> mix_dense(x, one, w, jnp.array([[1]]), lambda h: h).tolist()
    [[9.0]]
    """
    count = experts.gate.shape[0]
    taken = chosen[:, :, None] == jnp.arange(count)
    share = jnp.where(taken, weights[:, :, None], 0).sum(1)  # a token's experts differ
    share = share.T[:, :, None].astype(x.dtype)  # [E, N, 1]
    gate = contract("nw,ewf->enf", x, experts.gate)
    up = contract("nw,ewf->enf", x, experts.up)
    # an overflow in an expert that was not chosen must not reach the token
    hidden = jnp.where(share > 0, share * activation(gate) * up, 0)
    return contract("enf,efw->nw", hidden, experts.down)


def mix_gathered(
    x: jax.Array,
    experts: Experts,
    weights: jax.Array,
    chosen: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Each token brings the weights of its own experts: best where N A is below E.

    Arguments and result are those of `mix_dense`.

    >>> one = Experts(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
    >>> x, w = jnp.array([[3.0]]), jnp.array([[1.0]])
    >>> mix_gathered(x, one, w, jnp.array([[1]]), lambda h: h).tolist()
    [[9.0]]
    """
    gate, up, down = (pick(kernel, chosen) for kernel in experts)
    hidden = activation(contract("nw,nawf->naf", x, gate))
    hidden = hidden * contract("nw,nawf->naf", x, up)
    out = contract("naf,nafw->naw", hidden, down)
    return jnp.einsum("naw,na->nw", out, weights.astype(out.dtype))


class ExpertWeights(nn.Module):
    """The parameters of the experts of one layer."""

    count: int
    width: int
    inner: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Experts:
        """Returns the weights."""
        wide, narrow = (
            (self.count, self.width, self.inner),
            (
                self.count,
                self.inner,
                self.width,
            ),
        )
        into = nn.initializers.normal(self.width**-0.5)
        out = nn.initializers.normal(self.inner**-0.5)
        return Experts(
            leaf(self, "gate", into, wide, self.dtype),
            leaf(self, "up", into, wide, self.dtype),
            leaf(self, "down", out, narrow, self.dtype),
        )


class Mixture(nn.Module):
    """A router and its experts, in the place of an MLP."""

    width: int
    inner: int
    count: int
    active: int
    renormalise: bool
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any = jnp.float32
    skipped: int = 0

    def setup(self):
        """Declares the router and the experts."""
        self.router = Projection(self.width, self.count, False, self.dtype)
        self.experts = ExpertWeights(self.count, self.width, self.inner, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to `[B, T, W]`."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = route(
            self.router(flat), self.active, self.renormalise, self.skipped
        )
        few = flat.shape[0] * self.active <= self.count
        mix = mix_gathered if few else mix_dense
        return mix(flat, self.experts(), weights, chosen, self.activation).reshape(
            x.shape
        )
