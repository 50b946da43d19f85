"""Pickles of state dicts, read without executing them.

A pickle is a program that may call anything. This reader knows the few names that a
state dict needs, answers them with descriptions of its own, and refuses the rest by
name; no code that the file chose ever runs, and torch is not needed.
"""

import pickle
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "Double": np.dtype(np.float64),
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
    "ComplexFloat": np.dtype(np.complex64),
    "ComplexDouble": np.dtype(np.complex128),
    "Untyped": np.dtype(np.uint8),
}
_TYPES = {
    "bool": np.dtype(np.bool_),
    **{
        name: np.dtype(name)
        for name in (
            *("float64", "float32", "float16", "complex64", "complex128"),
            *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        )
    },
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in (
            *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz"),
            *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        )
    },
}


class Kind(NamedTuple):
    """A type of numbers, as a file names it."""

    name: str
    dtype: np.dtype


class Storage(NamedTuple):
    """Numbers that lie one behind the other, of which a tensor is a view."""

    key: str  # which block of the file
    dtype: np.dtype
    total: int  # numbers in the block
    start: int  # of the view of older files, in numbers
    size: int  # of that view, in numbers


class Tensor(NamedTuple):
    """A view of a storage; nothing of it is read yet."""

    storage: Storage
    dtype: np.dtype
    offset: int  # in numbers of dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers


class _Dict(dict):
    """A dictionary that takes the attributes of an OrderedDict, and forgets them."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Refused(ValueError):
    """The error that is no sign of damage; its text goes on after the path."""


def load(file: IO[bytes], path: Any) -> Any:
    """The object of one pickle, its tensors described and not read.

    Args:
      file: at the beginning of the pickle; is left behind its end.
      path: named in errors.

    Raises:
      ValueError: for a name that no state dict needs, and for a damaged file.

    >>> import io, os
    >>> load(io.BytesIO(pickle.dumps({"a": [1, 2]})), "a.bin")
    {'a': [1, 2]}
    >>> load(io.BytesIO(pickle.dumps(print)), "a.bin")
    Traceback (most recent call last):
    ValueError: a.bin wants builtins.print: it would execute it, and no state dict
    needs it; where you trust the file, open it in torch and save its state_dict as
    safetensors
    """
    try:
        return _Unpickler(file, encoding="utf-8").load()
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # what a damaged program may raise has no bounds
        kind = type(error).__name__
        raise ValueError(
            f"{path} holds a damaged pickle ({kind}: {error}); fetch it again"
        ) from None


# What torch writes in a state dict, and what leads to a name that is then refused.
_OPERATIONS = b"".join(
    getattr(pickle, name)
    for name in (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "BUILD", "REDUCE", "BINPERSID"),
        *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "DICT", "LIST", "TUPLE"),
        *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "ADDITEMS"),
        *("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    )
)


class _Unpickler(pickle._Unpickler):
    """pickle finds names by a method, so this one inherits.

    From the version in Python: the one in C sets memory aside by what a file claims.
    """

    dispatch = {
        code: run
        for code, run in pickle._Unpickler.dispatch.items()
        if code in _OPERATIONS
    }

    def find_class(self, module: str, name: str) -> Any:
        """Made anew for each file, so that no file can change them for the next."""
        # Python 2 says __builtin__
        place = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if place in ("collections.OrderedDict", "builtins.dict"):
            return _Dict
        if place in ("builtins.set", "builtins.list", "builtins.tuple", "torch.Size"):
            return {"set": set, "list": list}.get(name, tuple)
        if module in ("torch", "torch.storage", "torch.cuda"):
            kind = name.removesuffix("Storage")
            if kind != name and kind in _STORAGES:
                return Kind(name, _STORAGES[kind])
            if module == "torch" and name in _TYPES:
                return Kind(name, _TYPES[name])
        if module == "torch._utils":
            made = {
                "_rebuild_tensor": lambda *a: _tensor(*a),
                "_rebuild_tensor_v2": lambda *a: _tensor(*a),
                "_rebuild_tensor_v3": lambda *a: _tensor_v3(*a),
                "_rebuild_parameter": lambda tensor, *_: tensor,
            }
            if name in made:
                return made[name]
        raise _Refused(
            f"wants {place}: it would execute it, and no state dict needs "
            "it; where you trust the file, open it in torch and save its state_dict as "
            "safetensors"
        )

    def persistent_load(self, saved: Any) -> Storage:
        """A storage: ("storage", kind, key, device, count), in old files + its view."""
        word, kind, key, _, count, *view = saved
        if word != "storage" or not isinstance(kind, Kind):
            raise ValueError(f"unknown reference {word!r} to {kind!r}")
        _, start, size = view[0] if view and view[0] is not None else (key, 0, count)
        storage = Storage(str(key), kind.dtype, *map(_whole, (count, start, size)))
        if start + size > count:
            raise ValueError(f"a view of {size} at {start} in a storage of {count}")
        return storage


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: np.dtype | None = None,
) -> Tensor:
    del grad, hooks
    if metadata:
        raise _Refused(
            f"has a tensor with the marks {metadata}; save it in torch with its "
            "numbers resolved (resolve_conj, resolve_neg)"
        )
    shape, strides = tuple(map(_whole, shape)), tuple(map(_whole, strides))
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} has strides {strides}")
    tensor = Tensor(storage, dtype or storage.dtype, _whole(offset), shape, strides)
    have = storage.size * storage.dtype.itemsize
    need = (tensor.offset + span(tensor)) * tensor.dtype.itemsize
    if need > have:
        raise ValueError(f"a tensor of {need} bytes views a storage of {have}")
    return tensor


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad: bool,
    hooks: Any,
    kind: Kind,
    metadata: Any = None,
) -> Tensor:
    return _tensor(storage, offset, shape, strides, grad, hooks, metadata, kind.dtype)


def span(tensor: Tensor) -> int:
    """How many numbers lie between the first and the last of a tensor, both included.

    >>> kind = np.dtype(np.float32)
    >>> span(Tensor(Storage("0", kind, 6, 0, 6), kind, 0, (2, 2), (3, 1)))
    5
    """
    if 0 in tensor.shape:
        return 0
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a size was expected")
    return value
