"""A params tree under the names, and in the layout, of its checkpoint; and back.

Random masks, rows and name filters of a merge see canonical leaves: so a tree in memory
and the files it came from are merged alike.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from collab_jax.io.layout import Checkpoint, missing
from collab_jax.io.names import Rule, rules
from collab_jax.models.config import Config
from collab_jax.models.packed import plain


def to_checkpoint(config: Config, params: Any) -> dict[str, Any]:
    """The tensors of a checkpoint by name, from a params tree.

    Args:
      config: what the model is made of.
      params: a nested dict of arrays of numpy or JAX; tracers and sharded arrays too,
        which stay on their devices. Packed matrices are unpacked.

    Raises:
      KeyError: where the tree lacks a leaf.
      ValueError: for packed matrices that were rounded.

    >>> import jax
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.transformer import init
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> tensors = to_checkpoint(config, init(jax.random.key(0), config))
    >>> tensors["model.layers.0.mlp.up_proj.weight"].shape
    (8, 4)
    """
    return dict(tensors_of(rules(config), params))


def from_checkpoint(config: Config, tensors: dict[str, Any]) -> dict[str, Any]:
    """The params tree of the tensors of a checkpoint; the inverse of `to_checkpoint`.

    Args:
      config: what the model is made of.
      tensors: by canonical name.

    Raises:
      KeyError: where a tensor is missing.
      ValueError: where one has another shape than the configuration says.

    >>> import jax
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.transformer import init
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = init(jax.random.key(0), config)
    >>> again = from_checkpoint(config, to_checkpoint(config, params))
    >>> jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))
    True
    """
    return load_tree(config, tensors.__getitem__)


def canonically(
    config: Config, merge: Callable[..., dict[str, Any]]
) -> Callable[..., dict[str, Any]]:
    """A merge of checkpoints' tensors as a merge of params trees.

    Args:
      config: what the models are made of.
      merge: (part, base or None, experts, ...) -> tensors, such as
        `collab_jax.merge.memory.merge`.

    Returns:
      The same function over params trees.

    >>> import jax
    >>> from collab_jax.merge.memory import merge
    >>> from collab_jax.merge.recipes import dare
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.transformer import init
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base, expert = (init(jax.random.key(n), config) for n in range(2))
    >>> merged = canonically(config, merge)(dare(0.5), base, [expert])
    >>> merged["norm"]["scale"].shape
    (4,)
    """

    def over_trees(part, base, experts, *rest, **named):
        start = None if base is None else to_checkpoint(config, base)
        tensors = [to_checkpoint(config, expert) for expert in experts]
        return from_checkpoint(config, merge(part, start, tensors, *rest, **named))

    return over_trees


def load_tree(config: Config, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Builds a params tree, one rule after the other.

    Args:
      config: what the model is made of.
      read: canonical name -> tensor.

    Returns:
      A nested dict of numpy arrays.

    Raises:
      ValueError: where a tensor has another shape than the configuration says.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1})
    >>> shapes = {n: s for r in rules(config) for n, s in zip(r.names, r.shapes)}
    >>> tree = load_tree(config, lambda name: np.zeros(shapes[name]))
    >>> tree["layers_0"]["attention"]["k"]["kernel"].shape
    (4, 4)
    """
    return tree_of(rules(config), read)


def save_tree(config: Config, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a checkpoint in canonical order, one rule at a time.

    Args:
      config: what the model is made of.
      params: a nested dict of arrays.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 0})
    >>> shapes = {n: s for r in rules(config) for n, s in zip(r.names, r.shapes)}
    >>> tree = load_tree(config, lambda name: np.zeros(shapes[name]))
    >>> [name for name, _ in save_tree(config, tree)][:2]
    ['transformer.wte.weight', 'transformer.wpe.weight']
    """
    return tensors_of(rules(config), params, np.asarray)


def checked(
    found: Checkpoint,
    wanted: Iterable[Rule],
    rename: Callable[[str], str | None],
    family: str,
    folder: Any,
) -> Checkpoint:
    """The tensors that a model asks for, by canonical names, all of the right shapes.

    Args:
      found: the checkpoint.
      wanted: the rules of the model.
      rename: from a name on disk to the canonical one; None needs no reading.
      family: what an error calls the model.
      folder: and where it is.

    Raises:
      ValueError: for a missing or unexpected tensor, or a wrong shape.

    >>> from collab_jax.io.layout import Layout
    >>> rule = Rule((("a",),), ("x",), ((2,),), list, list)
    >>> layouts = {"model.x": Layout(np.dtype("float32"), (2,))}
    >>> file = Checkpoint(layouts, lambda name: np.zeros(2))
    >>> [*checked(file, [rule], lambda name: name[6:], "toy", "").layouts]
    ['x']
    """
    disk: dict[str, str] = {}
    for name in found.layouts:
        if (known := rename(name)) is not None:
            disk[known] = name
    shapes = {
        name: shape
        for rule in wanted
        for name, shape in zip(rule.names, rule.shapes, strict=True)
    }
    for name, shape in shapes.items():
        if name not in disk:
            raise missing(name, disk)
        real = found.layouts[disk[name]].shape
        if real != shape:
            raise ValueError(
                f"tensor {name} in {folder} has the shape {list(real)}, config.json "
                f"implies {list(shape)}"
            )
    extra = [disk[name] for name in disk if name not in shapes]
    if extra:
        raise ValueError(
            f"{folder} holds {len(extra)} tensors that {family} does not have, such as "
            + ", ".join(extra[:3])
        )
    layouts = {name: found.layouts[disk[name]] for name in shapes}
    return Checkpoint(layouts, lambda name: found.read(disk[name]))


def tree_of(found: Iterable[Rule], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Builds a params tree by any rules, one after the other.

    Args:
      found: the bijection of a model.
      read: canonical name -> tensor.

    Returns:
      A nested dict of what the rules make of the tensors.

    Raises:
      ValueError: where a tensor has another shape than the rules say.

    >>> rule = Rule((("a", "b"),), ("x",), ((2,),), list, list)
    >>> tree_of([rule], lambda name: np.zeros(2))
    {'a': {'b': array([0., 0.])}}
    """
    tree: dict[str, Any] = {}
    for rule in found:
        tensors = [read(name) for name in rule.names]
        for name, tensor, shape in zip(rule.names, tensors, rule.shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"tensor {name} has shape {tensor.shape}, but config.json "
                    f"implies {shape}"
                )
        for path, leaf in zip(rule.paths, rule.load(tensors), strict=True):
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = leaf
    return tree


def tensors_of(
    found: Iterable[Rule],
    params: Any,
    read: Callable[[Any], Any] = lambda leaf: leaf,
) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of a checkpoint by any rules, one after the other.

    Args:
      found: the bijection of a model.
      params: a nested dict of arrays.
      read: what is done with each leaf first.

    Raises:
      KeyError: where the tree lacks a leaf.

    >>> rule = Rule((("a", "b"),), ("x",), ((2,),), list, list)
    >>> [*tensors_of([rule], {"a": {"b": np.zeros(2)}})]
    [('x', array([0., 0.]))]
    """
    for rule in found:
        leaves = []
        for path in rule.paths:
            node = params
            for part in path:
                node = node[part]
            leaves.append(read(plain(node, "/".join(path))))
        yield from zip(rule.names, rule.save(leaves), strict=True)
