"""Checkpoints of torch (.bin, .pt, .pth), without torch and without executing them.

Since torch 1.6 a file is a zip archive: one pickle that describes the tensors, and one
uncompressed member for each storage. Before, it was a row of pickles followed by the
storages. In both, a tensor's numbers lie in the file as they are and are mapped one
tensor at a time. Tensors may share a storage, and need not be contiguous in it.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from collab_jax.io.layout import Checkpoint, Layout, missing, single_or_sharded
from collab_jax.io.region import region
from collab_jax.io.unpickle import Storage, Tensor, load, span

# what training scripts put a state dict into
WRAPPERS = ("state_dict", "model_state_dict", "model")
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number older files begin with
_CURE = "open it in torch and save its state_dict as safetensors"


def open_file(path: str | Path) -> Checkpoint:
    """The tensors of one file that torch.save wrote.

    Args:
      path: of a state dict, or of a dictionary that holds one as `state_dict`,
        `model_state_dict` or `model`.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file that is cut off, is of another format, holds something else
        than tensors, or would execute code.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.bin"
    >>> _ = path.write_text("version https://git-lfs.github.com/spec/v1")
    >>> open_file(path)
    Traceback (most recent call last):
    ValueError: ...a.bin is a pointer of Git LFS: fetch the file itself by git lfs pull
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(len(_OLD))
        if head.startswith(b"PK\x03\x04"):
            found, starts = _zip(path)
        elif head == _OLD:
            found, starts = _old(file, path)
        elif head.startswith(b"version https"):
            raise ValueError(
                f"{path} is a pointer of Git LFS: fetch the file itself by git lfs pull"
            )
        else:
            raise ValueError(
                f"{path} was not written by torch.save: it begins with {head[:8]!r}; "
                "fetch it again"
            )
    return _checkpoint(path, _state(path, found), starts)


def open_folder(folder: str | Path) -> Checkpoint:
    """The tensors of a model's folder: `pytorch_model.bin`, or the shards of its index.

    Args:
      folder: in the layout of Hugging Face.

    Raises:
      FileNotFoundError: where the folder holds no such file, or a shard is missing.
      ValueError: for a damaged file, or an index that does not fit its shards.

    >>> import tempfile
    >>> open_folder(tempfile.mkdtemp())
    Traceback (most recent call last):
    FileNotFoundError: ... holds no pytorch_model.bin and no
    pytorch_model.bin.index.json
    """
    return single_or_sharded(Path(folder), "pytorch_model.bin", open_file)


def _zip(path: Path) -> tuple[Any, dict[str, int]]:
    """The pickle's object, and where the storages begin."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            texts = {
                name: archive.read(name)
                for name, info in members.items()
                if name.endswith(("/data.pkl", "/byteorder")) and name.count("/") == 1
                # a compressed pickle may be as long as it likes
                if info.compress_type == zipfile.ZIP_STORED
            }
    except Exception as error:  # what a damaged archive may raise has no bounds
        raise ValueError(
            f"{path} is cut off or damaged ({error}); fetch it again"
        ) from None
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError(f"{path} has compressed members; {_CURE}")
    stems = [n.removesuffix("data.pkl") for n in texts if n.endswith("data.pkl")]
    if len(stems) != 1:
        raise ValueError(
            f"{path} is a zip archive that torch.save did not write: it has "
            f"{len(stems)} members */data.pkl"
        )
    stem = stems[0]
    if f"{stem}constants.pkl" in members:
        raise ValueError(f"{path} holds a TorchScript program; {_CURE}")
    if texts.get(f"{stem}byteorder", b"little") != b"little":
        raise ValueError(f"{path} has its bytes in big-endian order; {_CURE}")
    found = load(io.BytesIO(texts[f"{stem}data.pkl"]), path)
    starts = {}
    with path.open("rb") as file:
        for storage in _storages(found):
            info = members.get(f"{stem}data/{storage.key}")
            start = -1 if info is None else _start(file, info)
            if info is None or info.file_size < _bytes(storage) or start < 0:
                raise ValueError(
                    f"{path} lacks {_bytes(storage)} bytes of storage {storage.key}: "
                    "it is cut off or damaged; fetch it again"
                )
            starts[storage.key] = start
    return found, starts


def _start(file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member begin; -1 where it is no member."""
    if not 0 <= member.header_offset < member.header_offset + 30 < 1 << 62:
        return -1
    head = os.pread(file.fileno(), 30, member.header_offset)
    if len(head) < 30 or not head.startswith(b"PK\x03\x04"):
        return -1
    # the member's name and an extra field stand between
    return member.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))


def _old(file: io.BufferedReader, path: Path) -> tuple[Any, dict[str, int]]:
    """The same of a file from before torch 1.6; file is behind the magic number."""
    load(file, path)  # version of the format
    system = load(file, path)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError(f"{path} has its bytes in big-endian order; {_CURE}")
    found = load(file, path)
    order = load(file, path)
    storages = {storage.key: storage for storage in _storages(found)}
    starts, size = {}, path.stat().st_size
    for key in map(str, order):
        head = file.read(8)
        if key not in storages:
            raise ValueError(
                f"{path} has a storage {key} that no tensor is in; {_CURE}"
            )
        need = _bytes(storages[key])
        starts[key] = file.tell()
        if head != struct.pack("<q", storages[key].total) or starts[key] + need > size:
            raise ValueError(
                f"{path} has {size} bytes and lacks {need} of storage {key}: it is "
                "cut off or damaged; fetch it again"
            )
        file.seek(need, os.SEEK_CUR)
    if absent := set(storages) - set(starts):
        raise ValueError(f"{path} lacks storage {min(absent)}; fetch it again")
    return found, starts


def _storages(found: Any) -> Iterable[Storage]:
    """The storages of all tensors below an object, each once, as long as it must be."""
    seen: dict[str, Storage] = {}
    left = [found]
    visited: set[int] = set()
    while left:
        node = left.pop()
        if isinstance(node, Tensor):
            storage = node.storage
            known = seen.setdefault(storage.key, storage)
            if _bytes(storage) > _bytes(known):
                seen[storage.key] = storage
        elif isinstance(node, dict | list | tuple) and id(node) not in visited:
            visited.add(id(node))  # a pickle may hold itself
            left.extend(node.values() if isinstance(node, dict) else node)
    return seen.values()


def _bytes(storage: Storage) -> int:
    return storage.total * storage.dtype.itemsize


def _state(path: Path, found: Any) -> dict[str, Tensor]:
    """The dictionary of tensors within what was saved."""
    for _ in range(2):  # {"model": {"state_dict": ...}} is seen, deeper is not
        if not isinstance(found, dict) or any(
            isinstance(value, Tensor) for value in found.values()
        ):
            break
        inside = [key for key in WRAPPERS if isinstance(found.get(key), dict)]
        if len(inside) > 1:
            raise ValueError(f"{path} holds several models, {inside}; {_CURE}")
        if not inside:
            break
        found = found[inside[0]]
    if not isinstance(found, dict):
        kind = "a single tensor" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{path} holds {kind}, a dictionary of tensors is expected")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__.lstrip("_").lower()
            raise ValueError(
                f"{path} holds {kind} under {name!r}, where only tensors are expected; "
                f"{_CURE}"
            )
    return found


def _checkpoint(
    path: Path, tensors: dict[str, Tensor], starts: dict[str, int]
) -> Checkpoint:
    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise missing(name, tensors)
        tensor = tensors[name]
        storage, dtype, offset, shape, strides = tensor
        start = starts[storage.key] + storage.start * storage.dtype.itemsize
        numbers = span(tensor)
        flat = region(path, dtype, start + offset * dtype.itemsize, (numbers,))
        if numbers == math.prod(shape) and strides == _dense(shape):
            return flat.reshape(shape)
        steps = [stride * dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    layouts = {name: Layout(t.dtype, t.shape) for name, t in tensors.items()}
    return Checkpoint(layouts, read)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of rows that lie one behind the other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
