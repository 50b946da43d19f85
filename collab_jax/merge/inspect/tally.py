"""What was found in single tensors, added up: over layers, modules, the model."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from collab_jax.merge.inspect import diagnose
from collab_jax.merge.inspect.compare import Compared
from collab_jax.merge.inspect.correspond import Matched
from collab_jax.merge.inspect.diagnose import Statistics
from collab_jax.merge.plan import layout


class Site(NamedTuple):
    """Where a tensor belongs in its model."""

    part: str  # "embedding", "layer 3", "last norm", "head"
    module: str  # the same in all layers: "self_attn.q_proj.weight"
    layer: int | None


class Row(NamedTuple):
    """Some tensors together."""

    name: str
    tensors: int
    entries: int
    statistics: Statistics
    # [N] means over the matrices whose ranks are known, or None: the effective rank as
    # a share of the smaller side; the effective rank; the stable rank
    ranks: tuple[np.ndarray, np.ndarray, np.ndarray] | None


def sites(names: Iterable[str]) -> dict[str, Site]:
    """Where each tensor belongs, read off the names.

    Args:
      names: of all tensors of a model.

    >>> sites(["wte.weight", "h.0.mlp.up.weight", "norm.weight"])["h.0.mlp.up.weight"]
    Site(part='layer 0', module='mlp.up.weight', layer=0)
    """
    names = list(names)
    try:
        found = layout.structure(names)
    except ValueError:  # layers are missing: which is told where it matters
        found = layout.Structure({}, names)
    largest = max(
        found.stacks, key=lambda prefix: len(found.stacks[prefix]), default=None
    )
    where = {}
    for prefix, layers in found.stacks.items():
        label = "layer" if prefix == largest else prefix
        for i, rests in enumerate(layers):
            for rest in rests:
                kind = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", rest)
                where[f"{prefix}.{i}.{rest}"] = Site(f"{label} {i}", kind, i)
    for name in found.loose:
        if layout.before_layers(name):
            part = "embedding"
        elif layout.is_head(name):
            part = "head"
        else:
            part = "last norm" if re.search(r"norm|ln_|layer_norm", name) else "others"
        where[name] = Site(part, name, None)
    return {name: where[name] for name in names}


def matrices(
    matched: Iterable[Matched], where: dict[str, Site]
) -> dict[str, list[Matched]]:
    """Matrices by part, for `collab_jax.merge.inspect.compare.choose`.

    >>> one = Matched("h.0.up.weight", (), (2, 2), False)
    >>> matrices([one], sites(["h.0.up.weight"])).keys()
    dict_keys(['layer 0'])
    """
    found: dict[str, list[Matched]] = {}
    for tensor in matched:
        if len(tensor.shape) == 2 and not tensor.buffer and min(tensor.shape) > 0:
            found.setdefault(where[tensor.name].part, []).append(tensor)
    return found


def row(name: str, compared: Sequence[Compared]) -> Row:
    """Several tensors as one; those without sums (buffers) are left out.

    Args:
      name: what they are called together.
      compared: at least one, with sums.

    >>> found = diagnose.sums(np.ones(2), [np.float64([1, 2])], [0])
    >>> row("all", [Compared("a", (2,), found, None, (), (False,))]).entries
    2
    """
    parts = [c for c in compared if c.sums is not None]
    total = reduce(diagnose.add, (c.sums for c in parts if c.sums is not None))
    known = [
        [(r.effective / min(c.shape), r.effective, r.stable) for r in c.ranks]
        for c in parts
        if c.ranks is not None
    ]
    ranks: Any = None
    if known:
        mean = np.array(known).mean(0)  # [N, 3]
        ranks = tuple(mean.T)
    return Row(name, len(parts), int(total.size), diagnose.statistics(total), ranks)


def between(matrix: np.ndarray) -> np.ndarray:
    """The entries of an `[N, N]` matrix that belong to pairs, without NaN.

    >>> between(np.array([[1, 0.5], [0.5, 1]])).tolist()
    [0.5]
    """
    values = matrix[np.tril_indices(len(matrix), -1)]
    return values[~np.isnan(values)]


def rows(
    compared: Sequence[Compared], key: Callable[[Compared], str]
) -> tuple[Row, ...]:
    """Tensors together that have the same key, in the order in which keys appear.

    Args:
      compared: of `collab_jax.merge.inspect.compare`.
      key: from a tensor to the name of its row.

    >>> found = diagnose.sums(np.ones(2), [np.float64([1, 2])], [0])
    >>> two = [Compared(n, (2,), found, None, (), (False,)) for n in "ab"]
    >>> [r.name for r in rows(two, lambda c: c.name)]
    ['a', 'b']
    """
    groups: dict[str, list[Compared]] = {}
    for each in compared:
        if each.sums is not None and each.sums.size:
            groups.setdefault(key(each), []).append(each)
    return tuple(row(name, group) for name, group in groups.items())


def by_part(
    compared: Sequence[Compared], where: dict[str, Site], most: int | None = None
) -> tuple[Row, ...]:
    """A row for the embeddings, for every layer, and for the head.

    Args:
      compared: of `collab_jax.merge.inspect.compare`.
      where: of `sites`.
      most: rows at most: neighbouring layers are put together where there are more.

    >>> found = diagnose.sums(np.ones(2), [np.float64([1, 2])], [0])
    >>> names = [f"h.{i}.up.weight" for i in range(5)]
    >>> each = [Compared(n, (2,), found, None, (), (False,)) for n in names]
    >>> [r.name for r in by_part(each, sites(names), 3)]
    ['layers 0-1', 'layers 2-3', 'layer 4']
    """
    stacks: dict[str, int] = {}
    for site in where.values():
        if site.layer is not None:
            stack = site.part.rsplit(" ", 1)[0]
            stacks[stack] = max(stacks.get(stack, 0), site.layer + 1)
    loose = len({site.part for site in where.values() if site.layer is None})
    width = 1
    while most is not None and width < max(stacks.values(), default=0):
        if loose + sum(-(-count // width) for count in stacks.values()) <= most:
            break
        width += 1

    def key(each: Compared) -> str:
        site = where[each.name]
        if site.layer is None or width == 1:
            return site.part
        stack = site.part.rsplit(" ", 1)[0]
        first = site.layer // width * width
        last = min(first + width, stacks[stack]) - 1
        if first == last:
            return f"{stack} {first}"
        return f"{'layers' if stack == 'layer' else stack} {first}-{last}"

    return rows(compared, key)
