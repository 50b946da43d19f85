"""Embedding and output matrices of several models, brought to one vocabulary.

Shape letters: V tokens of the result, P its rows (V, or more where it is padded), V_n
rows of model n.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 32 * 2**20  # bytes of float32 rows that are averaged at a time


class Origin(NamedTuple):
    """Where the config says that a token's row comes from."""

    model: str | None  # None for a row of zeros
    row: int
    force: bool  # for all models, else for those that lack the token


class Rows(NamedTuple):
    """Where each row of the result's matrices comes from."""

    padded: int  # P
    models: dict[str, np.ndarray]  # name -> int64[V]: its row, -1 where it has none
    base: str | None
    origins: dict[int, Origin]  # by id in the result

    @property
    def size(self) -> int:
        """V, the number of rows that stand for tokens."""
        return len(next(iter(self.models.values())))


def align(
    rows: Rows, tensors: Mapping[str, np.ndarray], axis: int = 0
) -> dict[str, np.ndarray]:
    """The models' tensors of one name, with the same tokens at the same places.

    A model's own row stays. A row it lacks is the one that the config names, or else
    that of the base, or else the mean over the models that have the token:

        out_n[v] = x_n[r_n(v)]                           where r_n(v) >= 0
                   sum_{m in D(v)} x_m[r_m(v)] / |D(v)|  elsewhere

    with D(v) = {base} where the base has v, and else all that have it. Rows of padding
    are the mean of the model's other rows. Where no model has the token, it is zero.

    Args:
      rows: from `collab_jax.io.vocabulary.vocabulary`.
      tensors: of the models that are merged, `[V_n, ...]` by name, in the order of the
        config. They may differ in V_n, and have more rows than the tokenizer tokens.
      axis: the one that counts tokens.

    Returns:
      `[P, ...]` by name, of the types they came with. Means are taken in float32, in
      float64 for that type. A tensor that fits as it is comes back itself, not copied.

    Raises:
      ValueError: for tensors of too few rows, of different other axes, or where a model
        that the config takes a row from is not among them.

    Source: the rules of mergekit 0.1.5, found by running it.

    >>> rows = Rows(3, {"a": np.array([0, 1, -1]), "b": np.array([1, -1, 0])}, None, {})
    >>> a, b = np.float32([[1], [2]]), np.float32([[30], [10]])
    >>> out = align(rows, {"a": a, "b": b})
    >>> out["a"].ravel().tolist(), out["b"].ravel().tolist()
    ([1.0, 2.0, 30.0], [10.0, 2.0, 30.0])
    """
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    if axis:
        moved = {name: np.moveaxis(x, axis, 0) for name, x in tensors.items()}
        return {n: np.moveaxis(x, 0, axis) for n, x in align(rows, moved).items()}
    check(rows, {name: x.shape for name, x in tensors.items()})
    donors = _donors(rows, list(tensors))
    forced = [id for id, origin in rows.origins.items() if origin.force]
    return {name: _one(rows, name, tensors, donors, forced) for name in tensors}


def check(rows: Rows, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Objects to tensors that `align` could not bring together; it needs shapes only.

    Args:
      rows: what `align` gets.
      shapes: of the models' tensors, by name; the first axis counts tokens.

    Raises:
      ValueError: as `align` does.

    >>> check(Rows(2, {"a": np.array([0, 5])}, None, {}), {"a": (4, 8)})
    Traceback (most recent call last):
    ValueError: a has 4 rows for tokens, its tokenizer reaches row 5; take the ...
    """
    first: tuple[str, tuple[int, ...]] | None = None
    for name, shape in shapes.items():
        if name not in rows.models:
            raise ValueError(
                f"no tokenizer of {name} was read; known are {', '.join(rows.models)}"
            )
        highest = int(rows.models[name].max(initial=-1))
        if highest >= shape[0]:
            raise ValueError(
                f"{name} has {shape[0]} rows for tokens, its tokenizer reaches row "
                f"{highest}; take the tokenizer that belongs to these weights"
            )
        first = first or (name, shape)
        if shape[1:] != first[1][1:]:
            raise ValueError(
                f"{first[0]} has shape {list(first[1])}, {name} {list(shape)}: only "
                "the number of tokens may differ"
            )
    for id, (model, row, _) in rows.origins.items():
        if model is None:
            continue
        if model not in shapes:
            raise ValueError(
                f"the token with id {id} takes its row from {model}, which is not "
                f"merged here ({', '.join(shapes)}); name one of these"
            )
        if not 0 <= row < shapes[model][0]:
            raise ValueError(
                f"the token with id {id} takes row {row} of {model}, which has "
                f"{shapes[model][0]}"
            )


def unknown(rows: Rows, models: Iterable[str]) -> np.ndarray:
    """Ids that none of some models has a row for; `align` gives them rows of zeros.

    Args:
      rows: of all models.
      models: those that are merged.

    Returns:
      int64, ascending. Tokens whose origin the config names are not among them.

    >>> rows = Rows(2, {"a": np.array([0, -1]), "b": np.array([0, 1])}, None, {})
    >>> unknown(rows, ["a"]).tolist(), unknown(rows, ["a", "b"]).tolist()
    ([1], [])
    """
    none = np.ones(rows.size, bool)
    for name in models:
        none &= rows.models[name] < 0
    none[list(rows.origins)] = False
    return np.flatnonzero(none)


def _donors(rows: Rows, models: Sequence[str]) -> dict[str, np.ndarray]:
    """For each model int64[V]: its row in the mean that others get, or -1."""
    donors = {name: rows.models[name].copy() for name in models}
    if rows.base in donors:
        known = donors[rows.base] >= 0
        for name in models:
            if name != rows.base:
                donors[name][known] = -1
    for id, (model, row, _) in rows.origins.items():
        for name in models:
            donors[name][id] = row if name == model else -1
    return donors


def _one(
    rows: Rows,
    name: str,
    tensors: Mapping[str, np.ndarray],
    donors: Mapping[str, np.ndarray],
    forced: list[int],
) -> np.ndarray:
    """The tensor of one model."""
    x, own, size = tensors[name], rows.models[name], rows.size
    lacks = own < 0
    lacks[forced] = True
    as_it_is = len(x) == size == rows.padded and not lacks.any()
    if as_it_is and (own == np.arange(size)).all():
        return x
    out = np.empty((rows.padded, *x.shape[1:]), x.dtype)
    np.take(x, np.maximum(own, 0), 0, out[:size], "clip")
    work = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    step = max(1, _BLOCK // max(1, x[:1].size * work.itemsize))
    ids = np.flatnonzero(lacks)
    for start in range(0, len(ids), step):
        block = ids[start : start + step]
        out[block] = _mean(block, tensors, donors, work)
    if rows.padded > size:
        total = np.zeros(x.shape[1:], np.float64)
        for start in range(0, size, step):
            total += out[start : min(start + step, size)].astype(np.float64).sum(0)
        out[size:] = (total / size).astype(work)
    return out


def _mean(
    ids: np.ndarray,
    tensors: Mapping[str, np.ndarray],
    donors: Mapping[str, np.ndarray],
    work: np.dtype,
) -> np.ndarray:
    """The mean over the models that give a row to these ids, zeros where none does."""
    shape = next(iter(tensors.values())).shape[1:]
    total = np.zeros((len(ids), *shape), work)
    count: np.ndarray = np.zeros(len(ids), work)
    for name, x in tensors.items():
        row = donors[name][ids]
        has = np.flatnonzero(row >= 0)
        total[has] += x[row[has]].astype(work)
        count[has] += 1
    total /= np.maximum(count, 1).reshape(-1, *[1] * len(shape))
    return total
