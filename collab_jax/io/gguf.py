"""GGUF files: metadata, and tensors dequantised one at a time.

A file is a header with typed key-value pairs, a table of tensors, and their blocks. The
header is parsed here, because gguf-py makes an array of every string and takes 17 s for
a vocabulary of 262k; the arithmetic of the blocks is gguf-py's.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from collab_jax.io.safetensors import Checkpoint, Layout, missing

# Types whose values are stored as such, and the types that gguf-py can dequantise.
PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = tuple(
    GGMLQuantizationType[name]
    for name in [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ]
)

_SCALARS = dict(zip((0, 1, 7, 2, 3, 4, 5, 6, 10, 11, 12), "Bb?HhIifQqd", strict=True))
_STRING, _ARRAY = 8, 9
_ROWS = 2048  # dequantised together: bounds the temporary memory


class Tensor(NamedTuple):
    """One line of the table of tensors."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # slowest dimension first, as in numpy
    start: int  # in bytes from the beginning of the file
    size: int  # in bytes


class Gguf(NamedTuple):
    """An opened file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def checkpoint(self) -> Checkpoint:
        """Its tensors under the names of GGUF; quantised ones read as float32."""
        layouts = {
            name: Layout(PLAIN.get(t.kind, np.dtype(np.float32)), t.shape)
            for name, t in self.tensors.items()
        }
        return Checkpoint(layouts, self._read)

    def _read(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise missing(name, self.tensors)
        kind, shape, start, size = self.tensors[name]
        if kind in PLAIN:
            return np.memmap(self.path, PLAIN[kind], "r", start, shape)
        blocks = np.memmap(self.path, np.uint8, "r", start, (size,))
        rows = blocks.reshape(math.prod(shape[:-1]), -1)
        values = np.empty((len(rows), shape[-1]), np.float32)
        for i in range(0, len(rows), _ROWS):
            values[i : i + _ROWS] = quants.dequantize(rows[i : i + _ROWS], kind)
        return values.reshape(shape)


def open_file(path: str | Path) -> Gguf:
    """Reads metadata and the table of tensors; the tensors stay on disk.

    Args:
      path: a .gguf file.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for a file of another format, one that is cut off, or a tensor of an
        unknown type.

    >>> import tempfile
    >>> from gguf import GGUFWriter
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
    >>> writer = GGUFWriter(path, "llama")
    >>> writer.add_tensor("x", np.float32([[1, 2]]))
    >>> writer.write_header_to_file(); writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file(); writer.close()
    >>> file = open_file(path)
    >>> file.metadata["general.architecture"], file.checkpoint().read("x").tolist()
    ('llama', [[1.0, 2.0]])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
        if size < 24:
            raise _cut(path, size, "its header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, table, end = _header(path, data)
            except struct.error:
                raise _cut(path, size, "its header") from None
    alignment = metadata.get("general.alignment", 32)
    origin = -(-end // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in table:
        tensor = Tensor(kind, shape, origin + offset, _bytes(path, name, kind, shape))
        if tensor.start + tensor.size > size:
            raise _cut(
                path, size, f"tensor {name}, to byte {tensor.start + tensor.size}"
            )
        tensors[name] = tensor
    return Gguf(path, metadata, tensors)


def _cut(path: Path, size: int, what: str) -> ValueError:
    return ValueError(
        f"{path} is cut off: it has {size} bytes, too few for {what}; fetch it again"
    )


def _bytes(path: Path, name: str, kind: GGMLQuantizationType, shape) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise ValueError(
            f"tensor {name} in {path} has rows of {shape[-1]} values, "
            f"{kind.name} needs a multiple of {block}"
        )
    return math.prod(shape) // block * size


def _header(
    path: Path, data: mmap.mmap
) -> tuple[dict[str, Any], Sequence[tuple[str, GGMLQuantizationType, tuple, int]], int]:
    """Metadata, (name, type, shape, offset) of the tensors, where the table ends."""
    version, tensor_count, pair_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; known are 2 and 3")
    cursor = _Cursor(data, 24)
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    if "general.architecture" not in metadata:
        raise ValueError(f"{path} states no general.architecture")
    known = (*PLAIN, *QUANTISED)
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        (dims,) = cursor.unpack("I")
        shape = cursor.unpack(f"{dims}Q")[::-1]
        kind, offset = cursor.unpack("IQ")
        if kind not in known:
            names = {t.value: t.name for t in GGMLQuantizationType}
            raise ValueError(
                f"tensor {name} in {path} has the type {names.get(kind, kind)}; known "
                "are " + ", ".join(t.name for t in known)
            )
        table.append((name, GGMLQuantizationType(kind), shape, offset))
    return metadata, table, cursor.position


class _Cursor:
    """A place in the header; every read moves it on."""

    def __init__(self, data: mmap.mmap, position: int):
        self.data, self.position = data, position

    def unpack(self, form: str) -> tuple:
        """Little-endian numbers without padding."""
        form = "<" + form
        values = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return values

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        (length,) = self.unpack("Q")
        if self.position + length > len(self.data):
            raise struct.error("string beyond the end")
        text = self.data[self.position : self.position + length]
        self.position += length
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """One value, or a list."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.unpack("IQ")
            if count > len(self.data):
                raise struct.error("array beyond the end")
            if kind in _SCALARS:
                return list(self.unpack(f"{count}{_SCALARS[kind]}"))
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value in the header has the unknown type {kind}")
        return self.unpack(_SCALARS[kind])[0]
