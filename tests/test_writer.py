"""The writer of known places: order, threads, missing tensors, full disks, kills."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from collab_jax.io import writer as module
from collab_jax.io.safetensors import DTYPES, Layout, open_folder, write_folder
from collab_jax.io.writer import create

RNG = np.random.default_rng(0)
SHAPES = ((), (1,), (7,), (64, 48), (3, 3, 8, 8), (0, 3))
TENSORS = {
    f"{name}{list(shape)}": RNG.integers(0, 2, (*shape, kind.itemsize), np.uint8)
    .view(kind)
    .reshape(shape)
    for name, kind in DTYPES.items()
    for shape in SHAPES
}
LAYOUTS = {name: Layout(t.dtype, t.shape) for name, t in TENSORS.items()}


def contents(folder):
    """Every file by name, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", [10**9, 30_000, 1])
def test_any_order_gives_the_same_bytes(tmp_path, size):
    """One file, some shards, a shard a tensor: as the writer in order makes them."""
    ordered, here = tmp_path / "ordered", tmp_path / "here"
    ordered.mkdir()
    here.mkdir()
    write_folder(ordered, LAYOUTS, TENSORS.values(), size)
    made = create(here, LAYOUTS, size)
    for name in np.random.default_rng(1).permutation(list(TENSORS)):
        made.write(name, TENSORS[name])
    made.close()
    assert contents(here) == contents(ordered)
    found = open_folder(here)
    assert found.layouts == LAYOUTS
    if size == 1:
        index = json.loads((here / "model.safetensors.index.json").read_text())
        total = sum(t.nbytes for t in TENSORS.values())
        assert index["metadata"] == {"total_size": total}


def test_the_peer_reads_it(tmp_path):
    """The safetensors package finds the same numbers and metadata."""
    from safetensors import safe_open

    numbers = {n: t for n, t in TENSORS.items() if "F8" not in n and "BF" not in n}
    made = create(tmp_path, {n: LAYOUTS[n] for n in numbers}, 10**9)
    for name, tensor in numbers.items():
        made.write(name, tensor)
    made.close()
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in numbers.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)


def test_threads_write_at_once(tmp_path, monkeypatch):
    """Eight threads, with flushes in between, and calls that write less than asked."""
    monkeypatch.setattr(module, "FLUSH", 5000)
    monkeypatch.setattr(module, "PIECE", 999)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, d, at: pwrite(f, d[:777], at))
    made, names = create(tmp_path, LAYOUTS, 20_000), list(TENSORS)

    def work(part):
        for name in names[part::8]:
            made.write(name, TENSORS[name])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    found = open_folder(tmp_path)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(
            found.read(name).reshape(-1).view(np.uint8),
            tensor.reshape(-1).view(np.uint8),
        )


def test_not_contiguous(tmp_path):
    """A transposed view is written as it reads."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16).T
    made = create(tmp_path, {"x": Layout(array.dtype, (3, 2))}, 100)
    made.write("x", array)
    made.close()
    np.testing.assert_array_equal(open_folder(tmp_path).read("x"), array)


TWO = {name: Layout(np.dtype(np.float32), (2,)) for name in ("x", "y")}
PAIR = np.float32([1, 2])


def test_wrong_tensors_are_refused(tmp_path):
    """Unknown, of another shape or type, twice."""
    made = create(tmp_path, TWO, 100)
    with pytest.raises(ValueError, match="the closest there is x"):
        made.write("xx", PAIR)
    with pytest.raises(ValueError, match=r"float32\[3\], announced was float32\[2\]"):
        made.write("x", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="float64"):
        made.write("x", np.zeros(2))
    made.write("x", PAIR)
    with pytest.raises(ValueError, match="a second time"):
        made.write("x", PAIR)
    made.write("y", PAIR)
    made.close()
    assert open_folder(tmp_path).read("x").tolist() == [1, 2]
    with pytest.raises(ValueError, match="already ended"):
        made.close()
    with pytest.raises(ValueError, match="after the end"):
        made.write("x", PAIR)
    made.abort()
    assert list(contents(tmp_path)) == ["model.safetensors"]


@pytest.mark.parametrize("size", [100, 8])
def test_missing_tensor_leaves_nothing(tmp_path, size):
    """A model with a hole is not given a name."""
    made = create(tmp_path, TWO, size)
    made.write("y", PAIR)
    with pytest.raises(ValueError, match=r"1 of 2 tensors were not written.* is x"):
        made.close()
    assert contents(tmp_path) == {}


def test_until_close_names_are_hidden(tmp_path):
    """No moment before the end shows a model; abort removes it."""
    made = create(tmp_path, TWO, 8)
    for name in TWO:
        assert all(file.startswith(".") for file in contents(tmp_path))
        made.write(name, PAIR)
    assert len(contents(tmp_path)) == 2
    with pytest.raises(FileNotFoundError):
        open_folder(tmp_path)
    made.abort()
    made.abort()
    assert contents(tmp_path) == {}


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "statvfs"])
def test_full_disk_shows_at_once(tmp_path, monkeypatch, call):
    """One line with both numbers before anything is written, and nothing stays."""
    if call == "statvfs":
        usage = module.shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(os, call, no_space, raising=False)
    with pytest.raises(OSError, match=r"\d+ bytes needed, \d+ free on") as caught:
        create(tmp_path, TWO, 8)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


def test_full_disk_while_writing(tmp_path, monkeypatch):
    """Where blocks could not be set aside: the error comes late, the result never."""
    made = create(tmp_path, TWO, 8)
    made.write("x", PAIR)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        with pytest.raises(OSError, match="8 bytes needed"):
            made.write("y", PAIR)
    with pytest.raises(ValueError, match="not written"):
        made.close()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_at_the_end_leaves_nothing(tmp_path, monkeypatch, call):
    """A disk that refuses the flush or the names; shards already named go too."""
    made = create(tmp_path, TWO, 8)
    for name in TWO:
        made.write(name, PAIR)
    function, calls = getattr(os, call), []

    def second_fails(*arguments):
        calls.append(arguments)
        return function(*arguments) if len(calls) < 2 else no_space()

    monkeypatch.setattr(os, call, second_fails)
    with pytest.raises(OSError, match="free on"):
        made.close()
    assert contents(tmp_path) == {}


def test_without_fallocate(tmp_path, monkeypatch):
    """Disks that cannot set blocks aside, and systems that do not have the call."""
    for missing in (True, False):

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        if missing:
            monkeypatch.delattr(os, "posix_fallocate")
        else:
            monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
        made = create(tmp_path, TWO, 100)
        for name in TWO:
            made.write(name, PAIR)
        made.close()
        assert open_folder(tmp_path).read("y").tolist() == [1, 2]


KILLED = """
import sys, os, signal
import numpy as np
from collab_jax.io.safetensors import Layout
from collab_jax.io.writer import create
two = {name: Layout(np.dtype(np.float32), (2,)) for name in ("x", "y")}
writer = create(sys.argv[1], two, int(sys.argv[2]))
writer.write("x", np.float32([1, 2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("size", [100, 8])
def test_kill_leaves_no_result(tmp_path, size):
    """What a kill leaves is hidden, and a new run does not mind it."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(size)], check=False
    )
    assert run.returncode == -signal.SIGKILL
    left = list(contents(tmp_path))
    assert left
    assert all(name.startswith(".") for name in left)
    with pytest.raises(FileNotFoundError):
        open_folder(tmp_path)
    made = create(tmp_path, TWO, size)
    for name in TWO:
        made.write(name, PAIR)
    made.close()
    assert open_folder(tmp_path).read("x").tolist() == [1, 2]
