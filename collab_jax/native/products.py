"""The handler of the native library as a function of arrays.

Shapes: R rows, K and N sizes of a weight matrix, P panels.
"""

from collections.abc import Sequence

import jax
import numpy as np

from collab_jax.native.build import Library, library

LANES = 32  # columns of a panel, PANEL in sets.h


def available() -> bool:
    """Whether the library is there; builds it at the first call.

    >>> available() in (True, False)
    True
    """
    return library().digest is not None


def products(
    x: jax.Array,
    panels: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    using: Library | None = None,
) -> tuple[jax.Array, ...]:
    """Products of the same rows with several packed matrices: `y_n = x @ w_n * s_n`.

    Sums are float32. Under vmap each array may have the new axis or not: members that
    share a matrix read it once. There is no derivative; what calls this has one.

    Args:
      x: `[R, K]` float32, or bfloat16 with panels that `Library.halves` names.
      panels: for each matrix `[P, K, 32]` float32, uint16 (for bfloat16) or uint8 (for
        int8), all of one type, as `models.layout.lay` makes them; what lies behind
        column N - 1 is not read into a result.
      scales: for uint8 `[N]` float32 for each matrix, otherwise none.
      results: `[R, N]` float32 of each matrix; inside of a `shard_map` they say over
        which axes the results vary, as `jax.eval_shape` of the plain form does.
      using: from `library`; None is what that says now.

    Returns:
      `[R, N]` float32 for each matrix.

    Raises:
      RuntimeError: where there is no library.

    >>> x = np.ones((2, 3), np.float32)
    >>> panels = np.ones((1, 3, LANES), np.float32)
    >>> results = [jax.ShapeDtypeStruct((2, 2), np.float32)]
    >>> y = products(x, [panels], [], results)[0] if available() else results[0]
    >>> y.shape
    (2, 2)
    """
    found = library() if using is None else using
    call = jax.ffi.ffi_call(
        found.target("products"), list(results), vmap_method="expand_dims"
    )
    return tuple(call(x, *panels, *scales, set=np.int32(found.set)))
