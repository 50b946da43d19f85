"""How the numbers of a packed matrix lie.

Columns lie in panels `[..., P, K, C]`: column `C p + c` of a matrix is `[p, :, c]`, and
behind the last there are zeros. bfloat16 is held by its bits: a compiler that sees the
type widens a whole table to read a row of it, and whole matrices before a loop.

The native library reads words of 32 bits: two steps of K of bfloat16 lie together, as
`[K / 2, C, 2]`, and four of int8, as `[K / 4, C, 4]` bytes `q + 128`; steps that are
left follow as they are. Types without a sign say that panels lie so.

Shapes: K size in, N size out, P panels of C columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

TOGETHER = {np.dtype(np.uint16): 2, np.dtype(np.uint8): 4}  # steps of K in a word
BITS = np.dtype(np.int16), np.dtype(np.uint16)  # of bfloat16


def lay(matrix: np.ndarray, columns: int, native: bool) -> np.ndarray:
    """A matrix as panels.

    Args:
      matrix: `[..., K, N]` float32, bfloat16 or int8.
      columns: C.
      native: whether as the library reads them.

    Returns:
      `[..., P, K, C]`.

    >>> lay(np.arange(6.0).reshape(2, 3), 2, False).tolist()
    [[[0.0, 1.0], [3.0, 4.0]], [[2.0, 0.0], [5.0, 0.0]]]
    """
    *lead, depth, size = matrix.shape
    count = -(-size // columns) if size else 0
    panels = np.zeros((*lead, count, depth, columns), matrix.dtype)
    for p in range(count):
        part = matrix[..., p * columns : (p + 1) * columns]
        panels[..., p, :, : part.shape[-1]] = part
    if panels.dtype == ml_dtypes.bfloat16:
        panels = panels.view(np.uint16 if native else np.int16)
    elif native and panels.dtype == np.int8:
        panels = (panels ^ np.int8(-128)).view(np.uint8)
    steps = TOGETHER.get(panels.dtype, 1)
    if steps == 1:
        return panels
    whole = depth // steps * steps
    words = panels[..., :whole, :].reshape(*lead, count, whole // steps, steps, columns)
    words = words.swapaxes(-1, -2).reshape(*lead, count, whole, columns)
    return np.concatenate([words, panels[..., whole:, :]], -2)


def held(panels: jax.Array) -> np.dtype:
    """The type of the numbers in panels.

    >>> held(jnp.zeros((1, 4, 32), jnp.uint8))
    dtype('int8')
    """
    if panels.dtype in BITS:
        return np.dtype(jnp.bfloat16)
    return np.dtype(jnp.int8) if panels.dtype == jnp.uint8 else panels.dtype


def matrix(panels: jax.Array, size: int, dtype: Any = jnp.float32) -> jax.Array:
    """The numbers `[..., K, N]`: the inverse of `lay`.

    Args:
      panels: `[..., P, K, C]`.
      size: N.
      dtype: in which the numbers are exact. The way there is a single step: a GPU takes
        that into the product, and of two it would write the matrix to its memory.

    >>> whole = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    >>> matrix(jnp.asarray(lay(whole, 2, True)), 3).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    *lead, count, depth, columns = panels.shape
    steps = TOGETHER.get(panels.dtype, 1)
    if steps > 1:
        whole = depth // steps * steps
        words = (
            panels[..., :whole, :]
            .reshape(*lead, count, whole // steps, columns, steps)
            .mT
        )
        words = words.reshape(*lead, count, whole, columns)
        panels = jnp.concatenate([words, panels[..., whole:, :]], -2)
    wide = jnp.moveaxis(panels, -3, -2).reshape(*lead, depth, count * columns)
    return widened(wide[..., :size], dtype)


def columns(panels: jax.Array, chosen: jax.Array) -> jax.Array:
    """Some columns in float32, read where they lie.

    Args:
      panels: `[P, K, C]`.
      chosen: `[...]` int32, numbers of columns.

    Returns:
      `[..., K]`.

    >>> laid = lay(np.arange(6.0, dtype=np.float32).reshape(2, 3), 2, True)
    >>> columns(jnp.asarray(laid), jnp.array(2)).tolist()
    [2.0, 5.0]
    """
    count, depth, width = panels.shape
    panel, column = chosen // width, chosen % width
    steps = TOGETHER.get(panels.dtype, 1)
    if steps == 1:
        return widened(panels[panel, :, column])
    whole = depth // steps * steps
    words = panels[:, :whole].reshape(count, whole // steps, width, steps)
    words = words[panel, :, column].reshape(*chosen.shape, whole)
    return widened(jnp.concatenate([words, panels[panel, whole:, column]], -1))


def widened(numbers: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers of panels in another type.

    Args:
      numbers: of any shape.
      dtype: in which they are exact.

    >>> widened(jnp.array([129], jnp.uint8)).tolist()
    [1.0]
    """
    if numbers.dtype in BITS:
        numbers = jax.lax.bitcast_convert_type(numbers, jnp.bfloat16)
    wide = numbers.astype(dtype)
    return wide - 128 if numbers.dtype == jnp.uint8 else wide
