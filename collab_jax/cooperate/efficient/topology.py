"""The shape of a draft tree that is known before its tokens: paths of ranks.

A path names a node by what leads to it from the root: (0, 2) is the third guess for the
second token behind the best guess for the first.

Shapes: N nodes, R guesses a token, D tokens of the longest path.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from collab_jax.cooperate.efficient.draft import check_size

# Shares of the next tokens by rank: guesses that shape the tree, and nothing else
SHARES = (0.5, 0.14, 0.08, 0.05, 0.04, 0.03, 0.025, 0.02)

Shares = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


def grow(nodes: int, shares: Shares = SHARES) -> tuple[tuple[int, ...], ...]:
    """The likeliest paths, if the r-th guess for every token is right with `shares[r]`.

    The probability of a path is the product of its guesses' shares. A path comes behind
    its own beginning.

    Args:
      nodes: N, at least 1.
      shares: falling, `[R]`; or a list for each token, `[D, R]`, as measured: then no
        path is longer than D, and a guess that was never right is not made.

    Returns:
      N paths, for `recycle_tree` or `parallel_tree`; fewer where no guess is left.

    Raises:
      ValueError: for fewer than 1 node, shares that do not fall from below 1, lists of
        numbers outside of [0, 1], or no guess to make.

    Source: for independent guesses the greedy choice is the best tree, arXiv
    2402.12374, arXiv 2401.10774.

    >>> grow(5, [0.6, 0.3])
    ((0,), (0, 0), (1,), (0, 0, 0), (0, 1))
    >>> grow(4, [[0.6, 0.3, 0.1], [0.2, 0.1, 0.0]])
    ((0,), (1,), (0, 0), (2,))
    """
    check_size("nodes", nodes)
    measured = len(shares) > 0 and np.ndim(shares[0]) == 1
    levels = [np.asarray(s, float) for s in (shares if measured else [shares])]
    every = np.concatenate(levels)
    if measured and not (((every >= 0) & (every <= 1)).all() and (levels[0] > 0).any()):
        raise ValueError(
            f"shares of {[level.tolist() for level in levels]}: for each token numbers "
            "between 0 and 1 are expected, some of the first token's above 0"
        )
    falling = every.size > 0 and (np.diff(every) <= 0).all()
    if not measured and not (falling and 0 < every[-1] <= every[0] < 1):
        raise ValueError(
            f"shares = {list(shares)}: numbers between 0 and 1 that fall are expected"
        )
    queue: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    paths: list[tuple[int, ...]] = []
    while len(paths) <= nodes and queue:
        weight, path = heapq.heappop(queue)
        paths.append(path)
        if measured and len(path) == len(levels):
            continue
        for rank, share in enumerate(levels[len(path) if measured else 0].tolist()):
            if share > 0:
                heapq.heappush(queue, (weight * share, (*path, rank)))
    return tuple(paths[1:])  # without the root


def check_paths(paths: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The parent and the rank of every node.

    Args:
      paths: the ranks of the tokens from the root to each node; every path but the
        first token's comes behind its own beginning.

    Raises:
      ValueError: for no paths, or one that is empty, negative, there twice, or before
        its own beginning.

    >>> check_paths([(0,), (1,), (0, 2)])
    ([-1, -1, 0], [0, 1, 2])
    """
    check_size("number of paths", len(paths))
    place: dict[tuple[int, ...], int] = {(): -1}
    for i, path in enumerate(map(tuple, paths)):
        if path in place or path[:-1] not in place or path[-1] < 0:
            raise ValueError(
                f"path {path}: new ranks of 0 or more behind a path that is there "
                "already are expected; order the paths by length"
            )
        place[path] = i
    nodes = [tuple(path) for path in paths]
    return [place[path[:-1]] for path in nodes], [path[-1] for path in nodes]
