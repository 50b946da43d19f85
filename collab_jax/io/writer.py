"""Safetensors written in any order, by several threads, every byte once.

Types and shapes are known before the first number is, so that all headers and all
places are: the files get their full length at once (a full disk shows before the work,
not after it), and each tensor goes to its place when it is ready. Until `close` the
files have hidden names, and nothing there can be taken for a result.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from collab_jax.io.layout import Layout, by_file, index_of, missing, size_of
from collab_jax.io.safetensors import check, header

PIECE = 1 << 24  # bytes of one call; larger ones are no faster
FLUSH = 1 << 26  # bytes after which the disk begins, so that `close` need not wait
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Writer(NamedTuple):
    """A model that is being written."""

    write: Callable[[str, np.ndarray], None]  # any tensor, once, from any thread
    close: Callable[[], None]  # all are written: the files get their names
    abort: Callable[[], None]  # the files go; after `close` it does nothing


class _Place(NamedTuple):
    """Where a tensor goes."""

    path: Path
    start: int
    layout: Layout


def create(
    folder: str | Path, layouts: dict[str, Layout], max_shard_size: int
) -> Writer:
    """Begins a model: `model.safetensors`, or shards with their index.

    Args:
      folder: exists; best one that nobody else looks at.
      layouts: types and shapes by name, in the order of the files.
      max_shard_size: bytes; a single tensor may be larger.

    Raises:
      OSError: for a disk that has no room for all of it. `write` raises it too, and
        ValueError for a tensor that is unknown, not as announced or already written;
        `close` raises ValueError where a tensor is missing, and removes the files.

    >>> import tempfile
    >>> from collab_jax.io.safetensors import open_folder
    >>> folder, two = Path(tempfile.mkdtemp()), Layout(np.dtype(np.float32), (2,))
    >>> writer = create(folder, {"x": two, "y": two}, max_shard_size=8)
    >>> writer.write("y", np.float32([3, 4]))
    >>> writer.write("x", np.float32([1, 2]))
    >>> writer.close()
    >>> open_folder(folder).read("y").tolist()
    [3.0, 4.0]
    """
    folder = Path(folder)
    shards = by_file(layouts, max_shard_size)
    partial = {file: folder / f".{file}.{os.getpid()}.partial" for file in shards}
    places = _begin(folder, shards, partial)
    lock = threading.Lock()
    begun: set[str] = set()
    done: set[str] = set()
    waiting = dict.fromkeys(partial.values(), 0)  # bytes that no flush knows of
    flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
    flushes: list[Future[None]] = []
    over = False

    def write(name: str, array: np.ndarray) -> None:
        if name not in places:
            raise missing(name, places)
        path, start, layout = places[name]
        check(name, array, layout)
        with lock:
            if over:
                raise ValueError(f"tensor {name} comes after the end of the writing")
            if name in begun:
                raise ValueError(f"tensor {name} is written a second time")
            begun.add(name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        file = os.open(path, os.O_WRONLY)
        try:
            _put(file, data, start)
        except OSError as error:
            raise _sorry(error, folder, len(data)) from error
        finally:
            os.close(file)
        with lock:
            done.add(name)
            waiting[path] += len(data)
            if waiting[path] >= FLUSH and not over:
                waiting[path] = 0
                flushes.append(flusher.submit(_flush, path))

    def end() -> bool:
        """Whether this call is the one that ends the writing."""
        nonlocal over
        with lock:
            first, over = not over, True
        flusher.shutdown(cancel_futures=True)
        return first

    def close() -> None:
        if not end():
            raise ValueError(f"the writing to {folder} has already ended")
        named: list[Path] = []
        try:
            if absent := [name for name in places if name not in done]:
                raise ValueError(
                    f"{len(absent)} of {len(places)} tensors were not written; the "
                    f"first of them is {absent[0]}"
                )
            try:
                for flush in flushes:
                    if not flush.cancelled():
                        flush.result()
                _publish(folder, shards, partial, named)
            except OSError as error:
                raise _sorry(error, folder, 0) from error
        except BaseException:
            _remove([*partial.values(), *named])
            raise

    def abort() -> None:
        if end():
            _remove(partial.values())

    return Writer(write, close, abort)


def _begin(
    folder: Path, shards: dict[str, dict[str, Layout]], partial: dict[str, Path]
) -> dict[str, _Place]:
    """Makes the files with their headers and in their full length."""
    heads = {file: header(part) for file, part in shards.items()}
    sizes = {
        file: len(heads[file][0]) + sum(map(size_of, part.values()))
        for file, part in shards.items()
    }
    total = sum(sizes.values())
    places = {}
    try:
        if total > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file, part in shards.items():
            head, starts = heads[file]
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(partial[file], flags, 0o666)
            try:
                _lengthen(descriptor, sizes[file])
                _put(descriptor, memoryview(head), 0)
            finally:
                os.close(descriptor)
            for name, layout in part.items():
                places[name] = _Place(partial[file], starts[name], layout)
    except OSError as error:
        _remove(partial.values())
        raise _sorry(error, folder, total) from error
    except BaseException:
        _remove(partial.values())
        raise
    return places


def _lengthen(file: int, size: int) -> None:
    """Sets the blocks of a file aside; only its length where the disk cannot."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
    os.ftruncate(file, size)


def _put(file: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + PIECE], start + done)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _publish(
    folder: Path,
    shards: dict[str, dict[str, Layout]],
    partial: dict[str, Path],
    named: list[Path],
) -> None:
    """Gives the files their names, the index last: without it shards are no model."""
    for path in partial.values():
        _flush(path)
    for file, path in partial.items():
        os.replace(path, folder / file)
        named.append(folder / file)
    if len(shards) > 1:
        index = folder / "model.safetensors.index.json"
        draft = folder / f".{index.name}.{os.getpid()}.partial"
        named.append(draft)
        draft.write_text(index_of(shards), encoding="utf-8")
        _flush(draft)
        os.replace(draft, index)
    _flush(folder)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _sorry(error: OSError, folder: Path, needed: int) -> OSError:
    """The same error in a line that says what to do."""
    if error.errno not in _FULL:
        return OSError(f"{folder} cannot be written to: {error.strerror or error}")
    free = shutil.disk_usage(folder).free
    return OSError(
        f"{needed} bytes needed, {free} free on the disk of {folder}: make room, or "
        "name another folder"
    )
