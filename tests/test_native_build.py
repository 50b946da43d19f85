"""How the native library is built: once, whole, or not at all."""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collab_jax import native
from collab_jax.native import build

needed = pytest.mark.skipif(not native.available(), reason=native.status())

FAILING = {
    "there is none": ("missing-compiler", "no C\\+\\+ compiler: missing-compiler"),
    "it fails": ("false", "false failed: status 1"),
    "it writes nothing": ("true", "No such file"),
}


@pytest.mark.parametrize("case", FAILING)
def test_without_a_compiler_xla_computes(case, monkeypatch, tmp_path):
    """The reason is said in a line, nothing is left behind, and nothing is raised."""
    compiler, reason = FAILING[case]
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path / "cache"))
    digest, loaded, said = build._registered.__wrapped__()
    assert digest is None
    assert loaded is None
    assert said.startswith("off, XLA computes instead: ")
    assert re.search(reason, said)
    assert "\n" not in said
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """An empty cache, and a compiler that gives what was compiled before."""
    path, _ = build.built()
    log = tmp_path / "log"
    script = tmp_path / "compiler"
    script.write_text(
        f"#!/bin/sh\necho >> {log}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp "{path}" "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path / "cache"))
    return lambda: len(log.read_text()) if log.exists() else 0


@needed
def test_it_is_built_once(ready, monkeypatch):
    path, _ = build.built()
    before = path.stat().st_mtime_ns
    monkeypatch.setenv("CXX", "missing-compiler")
    assert build.built()[0] == path
    assert path.stat().st_mtime_ns == before
    assert ready() == 1


@needed
@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"?"])
def test_a_broken_library_is_built_again(ready, spoil):
    path, _ = build.built()
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert build.built()[0].read_bytes() == whole
    assert ready() == 2


@needed
def test_it_is_built_by_several_at_once(ready):
    with ThreadPoolExecutor(8) as pool:
        found = {path for path, _ in pool.map(lambda _: build.built(), range(8))}
    (path,) = found
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_sources_are_in_the_wheel():
    """Hatch takes every file of the package; the sources must lie inside of it."""
    folder = Path(build.__file__).parent
    ends = "*.cc", "*.h", "*.inc"
    found = {path.name for end in ends for path in folder.glob(end)}
    assert found == {*build.SOURCES}


@functools.cache
def compiler():
    return next(filter(shutil.which, build.COMPILERS), None)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_sanitised_fuzz(tmp_path):
    """Random products under AddressSanitizer; a spoilt sum is found every time."""
    here = Path(__file__).parent / "native" / "fuzz.cc"
    program = tmp_path / "fuzz"
    command = [compiler(), "-std=c++17", "-O1", "-g", "-pthread", str(here)]
    command += ["-I", str(Path(build.__file__).parent), "-o", str(program)]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    quiet = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    for arguments in (["30", "1"], ["5", "2", "spoilt"]):
        done = subprocess.run(
            [str(program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=quiet,
        )
        assert done.returncode == 0, done.stdout + done.stderr
