"""The C++ library, compiled at first use and kept.

A wheel holds the source. Where a compiler is found the library is built once, into the
cache, under a name that holds everything it depends on and a digest of its own bytes:
one that was cut off is built again. One file has all instruction sets of a family of
processors, and chooses when it runs. Where there is no compiler, or it fails,
everything works through XLA, and `status` says why.

`COLLAB_JAX_NATIVE=0` turns it off; the name of an instruction set, as "generic", has
that one used instead of the best.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from collab_jax.cache import cache

SETS = "best", "generic", "neon", "avx2", "avx512", "vnni", "bf16"  # as in sets.h
TYPES = "float32", "bfloat16", "int8"  # likewise
UNITS = "product.cc", "attention.cc"
SOURCES = (
    *UNITS,
    "product.h",
    "attention.h",
    "sets.h",
    "digits.h",
    "share.h",
    "arrays.h",
    "panel.inc",
    "heads.inc",
)
HANDLERS = "products", "attend"
FLAGS = "-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"
COMPILERS = "c++", "g++", "clang++"
SECONDS = 300  # for a compiler that hangs

_log = logging.getLogger(__name__)


class Library(NamedTuple):
    """The library, or why there is none."""

    digest: str | None  # tells it apart; a part of the names of its handlers
    set: int  # number of the instruction set to use
    reason: str
    halves: tuple[str, ...] = ()  # types of weights that rows of bfloat16 meet as such

    def target(self, name: str) -> str:
        """What XLA knows a handler by.

        Raises:
          RuntimeError: where there is no library.

        >>> Library("0a", 0, "on").target("products")
        'collab_jax_products_0a'
        """
        if self.digest is None:
            raise RuntimeError(f"there is no native library: {self.reason}")
        return f"collab_jax_{name}_{self.digest}"


def chosen() -> str:
    """What `COLLAB_JAX_NATIVE` says: "0", or the name of an instruction set.

    Raises:
      ValueError: for another value.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, COLLAB_JAX_NATIVE="generic"):
    ...     chosen()
    'generic'
    """
    value = os.environ.get("COLLAB_JAX_NATIVE", "") or "best"
    value = "best" if value == "1" else value
    if value not in ("0", *SETS):
        raise ValueError(
            f"COLLAB_JAX_NATIVE={value}: 0, 1 or one of {', '.join(SETS)} is expected"
        )
    return value


def library() -> Library:
    """The library of this process, built and registered with XLA at the first call.

    Raises:
      ValueError: for a `COLLAB_JAX_NATIVE` that means nothing, or an instruction set
        that this processor lacks.

    >>> library().reason == status()
    True
    """
    return _library(chosen())


def status() -> str:
    """One line: which instruction sets the library has here, or why there is none.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, COLLAB_JAX_NATIVE="0"):
    ...     status()
    'off: COLLAB_JAX_NATIVE=0'
    """
    return library().reason


@functools.cache
def _library(value: str) -> Library:
    if value == "0":
        return Library(None, 0, "off: COLLAB_JAX_NATIVE=0")
    digest, loaded, reason = _registered()
    if loaded is None:
        return Library(None, 0, reason)
    if not loaded.collab_jax_supports(SETS.index(value)):
        raise ValueError(
            f"COLLAB_JAX_NATIVE={value}: this processor does not have it; {reason}"
        )
    number = SETS.index(value)
    halves = tuple(
        name
        for weights, name in enumerate(TYPES)
        if loaded.collab_jax_takes(number, weights, TYPES.index("bfloat16"))
    )
    return Library(digest, number, reason, halves)


@functools.cache
def _registered() -> tuple[str | None, ctypes.CDLL | None, str]:
    """Digest of the library, itself, and what there is to say."""
    try:
        path, digest = built()
        loaded = ctypes.CDLL(str(path))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(loaded[f"collab_jax_{name}"])
            target = Library(digest, 0, "").target(name)
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
        found = [
            name
            for number, name in enumerate(SETS)
            if number and loaded.collab_jax_supports(number)
        ]
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"off, XLA computes instead: {error}"
        _log.warning("the native library is %s", reason)
        return None, None, reason
    return digest, loaded, f"on: {', '.join(found)}"


def built() -> tuple[Path, str]:
    """Where the library lies, compiled now if it was not, and what tells it apart.

    Processes that build it at the same time each put a whole file in its place.

    Raises:
      OSError: for a cache that cannot be written to.
      RuntimeError: where no compiler is found, or it fails.

    >>> try:
    ...     path, digest = built()
    ... except RuntimeError as error:  # no compiler here
    ...     digest = path = ""
    >>> digest in str(path)
    True
    """
    here = Path(__file__).parent
    known = [(here / name).read_bytes() for name in SOURCES]
    facts = *FLAGS, jaxlib.__version__, sys.platform, platform.machine()
    known += [fact.encode() for fact in (*facts, *platform.libc_ver())]
    digest = _digest(b"\0".join(known))
    folder = cache() / "native"
    for path in folder.glob(f"products-{digest}-*.so"):
        if path.stem.endswith(_digest(path.read_bytes())):
            return path, digest
        path.unlink(missing_ok=True)
    units = [str(here / name) for name in UNITS]
    return _compile(units, folder, f"products-{digest}"), digest


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _compile(units: list[str], folder: Path, name: str) -> Path:
    """Compiles into another file, which then gets its name, whole or not at all."""
    compiler = _compiler()
    _log.info("building the native library with %s, once", compiler)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "products.so"
        includes = "-isystem", jax.ffi.include_dir()
        command = [compiler, *FLAGS, *includes, *units, "-o", str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{compiler} cannot be run: {error}") from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            said = said or done.stderr.splitlines() or [f"status {done.returncode}"]
            raise RuntimeError(f"{compiler} failed: {said[0]}")
        path = folder / f"{name}-{_digest(out.read_bytes())}.so"
        os.replace(out, path)
    return path


def _compiler() -> str:
    """The compiler of `CXX`, or the first that is there."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    raise RuntimeError(
        f"no C++ compiler: {wanted or ', '.join(COMPILERS)} not found; install one, or "
        "name it in CXX"
    )
