"""What `jax.tree` and `optax.tree` lack: stacking, and selection by path.

A path is the keys of a leaf joined by slashes, as in "layers_0/attention/q/kernel".
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure become one, every leaf with a new leading axis N.

    Args:
      trees: N trees with equal structures and shapes.

    Raises:
      ValueError: naming the first path where two trees differ.

    >>> stack([{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])["a"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    trees = list(trees)
    if not trees:
        raise ValueError("no tree was given, at least one is expected")
    for n, tree in enumerate(trees[1:], 1):
        if gap := difference(trees[0], tree):
            path, first, other = gap
            raise ValueError(
                f"trees 0 and {n} differ at {path}: {first} and {other}; equal "
                "structures and shapes are expected"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """The inverse of `stack`: one tree for every index of the leading axis.

    >>> [t["a"].item() for t in unstack({"a": jnp.arange(2)})]
    [0, 1]
    """
    count = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    if len(count) != 1:
        raise ValueError(f"leading axes of sizes {sorted(count)}: one is expected")
    return [jax.tree.map(lambda leaf, n=n: leaf[n], tree) for n in range(count.pop())]


def path_string(path: tuple) -> str:
    """A key path of `jax.tree_util` as "a/b/c".

    >>> [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
    ['a/0', 'a/1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree: Any) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`.

    >>> paths({"b": 1, "a": {"c": 2}})
    ['a/c', 'b']
    """
    return [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by its path.

    >>> shapes({"a": jnp.zeros((2, 3))})
    {'a': (2, 3)}
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): jnp.shape(leaf) for path, leaf in flat}


def difference(first: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first path at which two trees differ in shape, or None.

    Returns:
      The path, and the shape there in each tree; None in a tree that lacks the path.

    >>> difference({"a": jnp.zeros(2), "b": jnp.zeros(1)}, {"a": jnp.zeros(2)})
    ('b', (1,), None)
    """
    ours, theirs = shapes(first), shapes(other)
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            return path, ours.get(path), theirs.get(path)
    return None


def select(tree: Any, pattern: str) -> dict[str, Any]:
    """The leaves whose whole path matches a regular expression, by path.

    Args:
      tree: any tree.
      pattern: a regular expression for `re.fullmatch`.

    >>> list(select({"a": {"kernel": 1, "bias": 2}}, ".*/kernel"))
    ['a/kernel']
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    named = {path_string(path): leaf for path, leaf in flat}
    return {name: leaf for name, leaf in named.items() if re.fullmatch(pattern, name)}


def replace(tree: Any, leaves: dict[str, Any]) -> Any:
    """The tree with the leaves at these paths replaced.

    Args:
      tree: any tree.
      leaves: new leaf by path; a new leaf may itself be a tree.

    Raises:
      ValueError: for a path that the tree does not have.

    >>> replace({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 3}
    """
    unknown = leaves.keys() - set(paths(tree))
    if unknown:
        raise ValueError(f"no leaf at {sorted(unknown)}; the tree has {paths(tree)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(path_string(path), leaf), tree
    )


def size(tree: Any) -> int:
    """Bytes of all leaves, arrays or abstract shapes alike.

    >>> size({"a": jnp.zeros((2, 3), jnp.float32)})
    24
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def refuse_packed(tree: Any, what: str) -> None:
    """Raises where a tree holds packed matrices, see `collab_jax.models.packed`.

    Args:
      tree: any tree.
      what: is not to be done with them, for the error.

    Raises:
      ValueError: naming the first packed leaf.

    >>> refuse_packed({"a": jnp.zeros(2)}, "merged")
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: hasattr(node, "unpack")
    )
    for path, leaf in flat:
        if hasattr(leaf, "unpack"):
            raise ValueError(
                f"{path_string(path)} is packed and cannot be {what}: load the model "
                "without matrices=, or unpack it by collab_jax.models.packed.unpack"
            )
