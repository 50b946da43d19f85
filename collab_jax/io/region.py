"""A part of a file as an array."""

import math
import mmap
import os
from pathlib import Path

import numpy as np

SMALL = 1 << 18  # bytes; below it reading is cheaper than mapping


def region(
    path: str | Path, dtype: np.dtype, start: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Numbers that lie one behind the other in a file, as a read-only array.

    A large part is mapped: its pages are read when they are looked at, and leave the
    process with the array. A small one is read at once.

    Args:
      path: of the file.
      dtype: of the numbers.
      start: in bytes from the beginning of the file.
      shape: of the array.

    Raises:
      ValueError: where the file ends before the array does.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"
    >>> _ = path.write_bytes(bytes(range(8)))
    >>> region(path, np.dtype(np.uint8), 3, (2, 2)).tolist()
    [[3, 4], [5, 6]]
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size == 0:
        return _frozen(np.zeros(shape, dtype))
    file = os.open(path, os.O_RDONLY)
    try:
        if size <= SMALL:
            data: bytes | mmap.mmap = os.pread(file, size, start)
            extra, found = 0, start + len(data)
        else:
            # a map begins at a page
            extra = start % mmap.ALLOCATIONGRANULARITY
            found = os.fstat(file).st_size
            if found >= start + size:
                data = mmap.mmap(
                    file, extra + size, access=mmap.ACCESS_READ, offset=start - extra
                )
    finally:
        os.close(file)
    if found < start + size:
        raise ValueError(
            f"{path} ends before byte {start + size}, which it had when it was "
            "opened: it was changed meanwhile"
        )
    array = np.frombuffer(data, dtype, count, extra).reshape(shape)
    # parts of some formats begin anywhere; what computes wants whole words
    return array if array.flags.aligned else _frozen(array.copy())


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
