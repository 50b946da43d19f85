"""What is known of tensors on disk before they are read, and how files share them.

A checkpoint is a dictionary of layouts and a function that reads one tensor, whatever
the format. Large ones are cut into shards, with an index of what is where.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """Named tensors on disk, whatever the format: their layouts, how to read one."""

    layouts: dict[str, Layout]  # in the order of the file
    read: Callable[[str], np.ndarray]  # read-only; good until it is let go


def missing(name: str, known: Iterable[str]) -> ValueError:
    """The error for a tensor that is not there; it names the closest that are.

    >>> print(missing("norm.weight", ["norm.scale", "head"]))
    tensor norm.weight is missing from the checkpoint; the closest there is norm.scale
    """
    close = difflib.get_close_matches(name, list(known), 1, 0.0)
    hint = f"; the closest there is {close[0]}" if close else "; it is empty"
    return ValueError(f"tensor {name} is missing from the checkpoint{hint}")


def sharded(index: Path, open_shard: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The tensors of several files, by an index in the layout of Hugging Face.

    Args:
      index: a JSON file whose `weight_map` says which tensor is in which file.
      open_shard: opens one of these files.

    Raises:
      FileNotFoundError: where a shard is missing.
      ValueError: for a damaged index, or one that does not fit its shards.

    >>> import tempfile
    >>> index = Path(tempfile.mkdtemp()) / "model.safetensors.index.json"
    >>> _ = index.write_text('{"weight_map": {"x": "a.safetensors"}}')
    >>> x = Checkpoint({"x": Layout(np.dtype(np.int8), (2,))}, lambda _: np.ones(2))
    >>> sharded(index, lambda path: x).read("x").tolist()
    [1.0, 1.0]
    """
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({"" + file for file in where.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} holds no weight_map in JSON ({error!r}); fetch it again"
        ) from None
    if strangers := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index} names {strangers[0]}, which lies outside its folder")
    shards = {file: open_shard(index.parent / file) for file in files}
    for name, file in where.items():
        if name not in shards[file].layouts:
            raise ValueError(f"{index} places tensor {name} in {file}, which lacks it")

    def read(name: str) -> np.ndarray:
        if name not in where:
            raise missing(name, where)
        return shards[where[name]].read(name)

    return Checkpoint(
        {name: shards[file].layouts[name] for name, file in where.items()}, read
    )


def single_or_sharded(
    folder: Path, name: str, open_file: Callable[[Path], Checkpoint], hint: str = ""
) -> Checkpoint:
    """The tensors of a model's folder: one file, or the shards of its index.

    Args:
      folder: in the layout of Hugging Face.
      name: of the single file; the index has `.index.json` behind it.
      open_file: opens it, or a shard.
      hint: ends the error where neither is there.

    Raises:
      FileNotFoundError: where neither is there, or a shard is missing.
      ValueError: see `sharded`.

    >>> import tempfile
    >>> single_or_sharded(Path(tempfile.mkdtemp()), "a.bin", lambda path: None)
    Traceback (most recent call last):
    FileNotFoundError: ... holds no a.bin and no a.bin.index.json
    """
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        return open_file(folder / name)
    if index.exists():
        return sharded(index, open_file)
    raise FileNotFoundError(f"{folder} holds no {name} and no {index.name}{hint}")


def split(layouts: dict[str, Layout], max_size: int) -> Sequence[list[str]]:
    """Names in order, cut where the next tensor would not fit into the shard.

    >>> four = Layout(np.dtype(np.float32), (1,))
    >>> split({"a": four, "b": four, "c": four}, 8)
    [['a', 'b'], ['c']]
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, layout in layouts.items():
        if shards[-1] and size + size_of(layout) > max_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += size_of(layout)
    return shards


def by_file(
    layouts: dict[str, Layout], max_shard_size: int
) -> dict[str, dict[str, Layout]]:
    """The files of a model and their tensors, named as Hugging Face does.

    Args:
      layouts: types and shapes by name, in their order.
      max_shard_size: bytes; a single tensor may be larger.

    >>> four = Layout(np.dtype(np.float32), (1,))
    >>> list(by_file({"a": four, "b": four}, 4))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    shards = split(layouts, max_shard_size)
    if len(shards) == 1:
        return {"model.safetensors": dict(layouts)}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": {
            name: layouts[name] for name in names
        }
        for i, names in enumerate(shards, 1)
    }


def index_of(shards: dict[str, dict[str, Layout]]) -> str:
    """The text of the index that says which tensor is in which file.

    Args:
      shards: from `by_file`.

    >>> four = Layout(np.dtype(np.float32), (1,))
    >>> json.loads(index_of({"1.safetensors": {"a": four}}))
    {'metadata': {'total_size': 4}, 'weight_map': {'a': '1.safetensors'}}
    """
    where = {name: file for file, part in shards.items() for name in part}
    total = sum(size_of(layout) for part in shards.values() for layout in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(index, indent=2)


def size_of(layout: Layout) -> int:
    """How many bytes a tensor has.

    >>> size_of(Layout(np.dtype(np.float32), (2, 3)))
    24
    """
    return math.prod(layout.shape) * layout.dtype.itemsize
