"""Attention of new tokens over a cache, as a function of arrays.

Shapes: B rows, T tokens of this call, S slots, H key-value heads, G queries a key-value
head, K size of a head.
"""

import jax
import numpy as np

from collab_jax.native.build import Library, library

LARGEST = 512  # K, of sets.h


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    reach: tuple[jax.Array, jax.Array],
    cap: float | None,
    result: jax.ShapeDtypeStruct,
    using: Library | None = None,
) -> jax.Array:
    """Softmax attention with grouped queries: `softmax(cap(q k^T)) v`.

    Scores, weights and sums are float32. Under vmap each array may have the new axis or
    not. There is no derivative; what calls this has one.

    Args:
      q: `[B, T, H * G, K]` float32, scaled.
      k: `[B, H, S, K]` float32 or bfloat16.
      v: likewise.
      mask: `[B, T, S]` bool, which slots a token may read; at least one.
      reach: first slot, and the slot behind the last, that any token may read: `[]`
        int32.
      cap: scores become `cap * tanh(scores / cap)`.
      result: `[B, T, H * G * K]` float32; inside of a `shard_map` it says over which
        axes the result varies.
      using: from `library`; None is what that says now.

    Returns:
      `[B, T, H * G * K]` float32.

    Raises:
      RuntimeError: where there is no library.

    >>> q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 1, 3, 4), np.float32)
    >>> mask, reach = np.array([[[True, True, False]]]), (np.int32(0), np.int32(2))
    >>> result = jax.ShapeDtypeStruct((1, 1, 8), np.float32)
    >>> there = library().digest is not None
    >>> (attend(q, k, k, mask, reach, None, result) if there else result).shape
    (1, 1, 8)
    """
    found = library() if using is None else using
    call = jax.ffi.ffi_call(found.target("attend"), result, vmap_method="expand_dims")
    numbers = {"set": np.int32(found.set), "cap": np.float32(cap or 0)}
    return call(q, k, v, mask, *reach, **numbers)
