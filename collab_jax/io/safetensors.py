"""Tensors on disk in the safetensors format, one at a time.

A file is eight bytes of header length, a JSON header, and the tensors' bytes. Reading
maps only the tensor that is asked for and lets it go again, so that loading a model
never holds it twice. Writing streams: one tensor is in memory at a time.
"""

import json
import os
import struct
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from collab_jax.io.layout import (
    Checkpoint,
    Layout,
    by_file,
    index_of,
    missing,
    single_or_sharded,
    size_of,
)
from collab_jax.io.region import region

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation


class _Entry(NamedTuple):
    """Where one tensor lies."""

    path: Path
    layout: Layout
    start: int  # in bytes from the beginning of the file


def open_file(path: str | Path) -> Checkpoint:
    """The tensors of one file.

    Args:
      path: a .safetensors file.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is cut off or is no safetensors file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write(path, {"x": Layout(DTYPES["F32"], (2,))}, [np.float32([1, 2])])
    >>> open_file(path).read("x").tolist()
    [1.0, 2.0]
    """
    return _checkpoint(_entries(Path(path)))


def open_folder(folder: str | Path) -> Checkpoint:
    """The tensors of a model's folder: `model.safetensors`, or the shards of its index.

    Args:
      folder: in the layout of Hugging Face.

    Raises:
      FileNotFoundError: where the folder holds no such file, or a shard is missing.
      ValueError: for a damaged file, or an index that does not fit its shards.

    >>> import tempfile
    >>> folder, two = Path(tempfile.mkdtemp()), Layout(DTYPES["F32"], (2,))
    >>> ones = [np.ones(2, np.float32)] * 2
    >>> write_folder(folder, {"x": two, "y": two}, ones, max_shard_size=8)
    >>> list(open_folder(folder).layouts)
    ['x', 'y']
    """
    folder = Path(folder)
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; it holds {', '.join(others[:3])}, convert that first" if others else ""
    return single_or_sharded(folder, "model.safetensors", open_file, hint)


def _checkpoint(entries: dict[str, _Entry]) -> Checkpoint:
    def read(name: str) -> np.ndarray:
        if name not in entries:
            raise missing(name, entries)
        path, (dtype, shape), start = entries[name]
        return region(path, dtype, start, shape)

    return Checkpoint({name: entry.layout for name, entry in entries.items()}, read)


def _entries(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, max(size - 8, 0)):
            raise ValueError(
                f"{path} has {size} bytes and no complete safetensors header: it is "
                "cut off or of another format; fetch it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(
                f"{path} has a damaged safetensors header ({error}); fetch it again"
            ) from None
    try:
        header.pop("__metadata__", None)
        entries = {
            name: _entry(path, name, 8 + length, h) for name, h in header.items()
        }
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} has a damaged safetensors header ({error!r}); fetch it again"
        ) from None
    ends = (entry.start + size_of(entry.layout) for entry in entries.values())
    expected = max(ends, default=8 + length)
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, its header promises {expected}: "
            + ("it is cut off" if size < expected else "it holds something else too")
            + "; fetch it again"
        )
    return entries


def _entry(path: Path, name: str, origin: int, header: dict) -> _Entry:
    if header["dtype"] not in DTYPES:
        raise ValueError(
            f"tensor {name} in {path} has the unknown type {header['dtype']}; known "
            "are " + ", ".join(DTYPES)
        )
    # whole numbers, or a TypeError
    layout = Layout(DTYPES[header["dtype"]], tuple(map(index, header["shape"])))
    offsets = header["data_offsets"]
    start, end = index(offsets[0]), index(offsets[1])
    if start < 0 or end - start != size_of(layout) or min(layout.shape, default=0) < 0:
        raise ValueError(
            f"tensor {name} in {path} has {end - start} bytes at {start}, "
            f"{layout.dtype.name}{list(layout.shape)} needs {size_of(layout)}"
        )
    return _Entry(path, layout, origin + start)


def header(layouts: dict[str, Layout]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and where the tensors lie that follow it.

    Args:
      layouts: types and shapes by name, in their order.

    Returns:
      Length and header, and the first byte of each tensor from the file's beginning.

    Raises:
      ValueError: for a type that the format has not.

    >>> head, starts = header({"x": Layout(DTYPES["I8"], (3,))})
    >>> len(head) == starts["x"]
    True
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, layout in layouts.items():
        if layout.dtype not in _NAMES:
            raise ValueError(
                f"tensor {name} has the type {layout.dtype.name}, which the format "
                "safetensors has not"
            )
        end = offset + size_of(layout)
        entries[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes start at a multiple of eight
    head = struct.pack("<Q", len(text)) + text
    starts = {name: len(head) + entries[name]["data_offsets"][0] for name in layouts}
    return head, starts


def check(name: str, tensor: np.ndarray, layout: Layout) -> None:
    """Refuses a tensor that is not as its layout says.

    Raises:
      ValueError: for another type or shape.

    >>> check("x", np.float32([1, 2]), Layout(DTYPES["F32"], (2,)))
    """
    if Layout(tensor.dtype, tensor.shape) != layout:
        raise ValueError(
            f"tensor {name} is {tensor.dtype.name}{list(tensor.shape)}, "
            f"announced was {layout.dtype.name}{list(layout.shape)}"
        )


def write(
    path: str | Path, layouts: dict[str, Layout], tensors: Iterable[np.ndarray]
) -> None:
    """Writes one file, tensor after tensor; the file appears whole or not at all.

    Args:
      path: where to.
      layouts: types and shapes by name, in the order of the tensors.
      tensors: in that order; each is asked for when the one before it is written.

    Raises:
      ValueError: for a tensor that is not as announced.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write(path, {"x": Layout(DTYPES["I8"], (3,))}, [np.int8([1, 2, 3])])
    >>> list(path.read_bytes()[-3:])
    [1, 2, 3]
    """
    path = Path(path)
    head, _ = header(layouts)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(head)
            for (name, layout), tensor in zip(layouts.items(), tensors, strict=True):
                check(name, tensor, layout)
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(
    folder: str | Path,
    layouts: dict[str, Layout],
    tensors: Iterable[np.ndarray],
    max_shard_size: int,
) -> None:
    """Writes `model.safetensors`, or shards with their index where it would be too big.

    Args:
      folder: exists.
      layouts: types and shapes by name, in the order of the tensors.
      tensors: in that order.
      max_shard_size: bytes; a single tensor may be larger.

    >>> import tempfile
    >>> folder, two = Path(tempfile.mkdtemp()), Layout(DTYPES["F32"], (2,))
    >>> ones = [np.ones(2, np.float32)] * 2
    >>> write_folder(folder, {"x": two, "y": two}, ones, max_shard_size=8)
    >>> for path in sorted(folder.iterdir()):
    ...     print(path.name)
    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json
    """
    folder = Path(folder)
    shards = by_file(layouts, max_shard_size)
    stream = iter(tensors)
    if len(shards) == 1:
        write(folder / "model.safetensors", layouts, stream)
        return
    for file, part in shards.items():
        write(folder / file, part, (next(stream) for _ in part))
    (folder / "model.safetensors.index.json").write_text(index_of(shards))
