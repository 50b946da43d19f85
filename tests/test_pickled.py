"""Checkpoints of torch without torch: numbers, damage, programs that must not run."""

import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from collab_jax.io import pickled, weights
from collab_jax.io.safetensors import Layout, write_folder

GOLDEN = Path(__file__).parent / "golden"
WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
NUMBERS = {
    "whole": WHOLE,
    "transposed": WHOLE.T,
    "part": WHOLE[1:3, ::2],
    "tail": WHOLE[3],
    "spread": np.full((3, 2), 7, np.float32),
    "half": np.float16([0.5, -2]),
    "brain": np.array([[1, -0.5], [3, 256]], ml_dtypes.bfloat16),
    "double": np.float64([1 / 3]),
    "long": np.int64([-1, 2**40]),
    "byte": np.uint8([0, 255]),
    "bool": np.array([True, False]),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 5), np.float32),
}


def same(path, numbers):
    found = pickled.open_file(path)
    assert list(found.layouts) == list(numbers)
    for name, expected in numbers.items():
        array = found.read(name)
        assert found.layouts[name] == (expected.dtype, expected.shape)
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)
        assert not array.flags.writeable
        assert array.flags.aligned


@pytest.mark.parametrize("age", ["zip", "old"])
def test_golden_numbers(age):
    """Types, views and shared storages of both formats."""
    same(GOLDEN / f"pickled_{age}.bin", NUMBERS)


def test_named_types():
    """Types that have no storage of their own, and parameters."""
    eight = np.array([1, -2], ml_dtypes.float8_e4m3fn)
    numbers = {"eight": eight, "word": np.uint16([1, 65535])}
    same(GOLDEN / "pickled_named.bin", numbers | {"parameter": np.ones(2, np.float32)})


def test_training_run_is_unwrapped():
    """A state dict within the dictionary of a training script."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    same(GOLDEN / "pickled_run.bin", {"weight": weight, "bias": np.float32([8, 9])})


def test_large_parts_are_mapped(tmp_path, monkeypatch):
    """The same numbers where nothing is small enough to be read at once."""
    monkeypatch.setattr("collab_jax.io.region.SMALL", 0)
    same(GOLDEN / "pickled_zip.bin", NUMBERS)
    same(GOLDEN / "pickled_old.bin", NUMBERS)


# --- programs ---------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def archive(path, body):
    """A zip archive with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", body)
        file.writestr("archive/version", "3\n")
    return path


def old_archive(path, body):
    """The older format with a pickle of our own."""
    head = (GOLDEN / "pickled_old.bin").read_bytes()
    stream = io.BytesIO(head)
    for _ in range(3):
        pickle.load(stream)
    path.write_bytes(head[: stream.tell()] + body + pickle.dumps([], 2))
    return path


def programs(mark):
    """(pickle, the name it wants), each of which would write the file mark."""
    touch = f"open({str(mark)!r}, 'w').close()"
    yield pickle.dumps(Call(os.system, f"touch {mark}"), 2), "posix.system"
    yield pickle.dumps({"a": Call(eval, touch)}, 2), "builtins.eval"
    yield pickle.dumps({"a": Call(exec, touch)}, 4), "builtins.exec"
    inner = Call(builtins.getattr, Call(__import__, "os"), "system")
    yield pickle.dumps([{"a": (1, inner)}], 2), "builtins.getattr"
    yield pickle.dumps(Call(subprocess.Popen, ["touch", str(mark)]), 2), "Popen"
    # names that only look like those of a state dict
    yield b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"
    yield b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"
    yield b"\x80\x02ctorch.serialization\nload\nX\x01\x00\x00\x00a\x85R.", "load"
    # the opcodes INST and OBJ, and STACK_GLOBAL
    yield b"(S'touch'\nios\nsystem\n.", "os.system"
    yield b"(cos\nsystem\nS'touch'\no.", "os.system"
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"


@pytest.mark.parametrize("write", [archive, old_archive])
def test_programs_are_refused_by_name(tmp_path, write):
    """What a pickle may call is named and never called."""
    mark = tmp_path / "mark"
    for body, name in programs(mark):
        path = write(tmp_path / "a.bin", body)
        with pytest.raises(ValueError, match=name) as caught:
            pickled.open_file(path)
        assert "it would execute it" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not mark.exists()


def test_programs_would_have_run(tmp_path):
    """Negative control: pickle itself runs them."""
    mark = tmp_path / "mark"
    body, _ = next(programs(mark))
    pickle.loads(body)
    assert mark.exists()


def test_a_file_cannot_change_the_reader(tmp_path):
    """State that a pickle sets on a name stays within that pickle."""
    tensor = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    state = b"}X\x0c\x00\x00\x00__defaults__K\x01\x85s"
    archive(tmp_path / "a.bin", tensor + b"N" + state + b"\x86b.")
    with pytest.raises(ValueError, match="dictionary of tensors"):
        pickled.open_file(tmp_path / "a.bin")
    same(GOLDEN / "pickled_zip.bin", NUMBERS)


# --- damage -----------------------------------------------------------------------


@pytest.mark.parametrize("age", ["zip", "old"])
def test_cut_off_files_give_one_error(tmp_path, age):
    """Wherever the end is missing."""
    whole = (GOLDEN / f"pickled_{age}.bin").read_bytes()
    path = tmp_path / "a.bin"
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.bin") as caught:
            pickled.open_file(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("age", ["zip", "old"])
def test_changed_bytes_give_an_error_or_numbers(tmp_path, age):
    """Never an exception of another kind, nor a read outside of the file."""
    whole = (GOLDEN / f"pickled_{age}.bin").read_bytes()
    path, rng = tmp_path / "a.bin", np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            found = pickled.open_file(path)
            for name in found.layouts:
                found.read(name)
        except ValueError:
            refused += 1
    assert refused > 20


def test_other_contents_are_named(tmp_path):
    """What is no state dict is said to be what it is."""
    path = tmp_path / "a.bin"
    cases = (
        (pickle.dumps([1, 2], 2), "holds list"),
        (pickle.dumps({"a": 3}, 2), "holds int under 'a'"),
        (pickle.dumps({3: 3}, 2), "holds int under 3"),
        (pickle.dumps({"model": {}, "state_dict": {}}, 2), "several models"),
        (b"\x80\x02U", "damaged pickle"),
    )
    for body, message in cases:
        with pytest.raises(ValueError, match=message):
            pickled.open_file(archive(path, body))
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match=r"not written by torch\.save"):
        pickled.open_file(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("words.txt", "a")
    with pytest.raises(ValueError, match=r"torch\.save did not write"):
        pickled.open_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(ValueError, match="compressed"):
        pickled.open_file(path)
    archive(path, pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/constants.pkl", "")
    with pytest.raises(ValueError, match="TorchScript"):
        pickled.open_file(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pickled.open_file(tmp_path / "b.bin")


def test_missing_tensor_is_named():
    """The error of a name that is not there says the closest."""
    with pytest.raises(ValueError, match="the closest there is whole"):
        pickled.open_file(GOLDEN / "pickled_zip.bin").read("whale")


# --- folders ----------------------------------------------------------------------


def shards(folder):
    shutil.copy(GOLDEN / "pickled_run.bin", folder / "1.bin")
    shutil.copy(GOLDEN / "pickled_named.bin", folder / "2.bin")
    where = {"word": "2.bin", "bias": "1.bin", "weight": "1.bin"}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index


def test_folders(tmp_path):
    """One file, or shards with an index."""
    shards(tmp_path)
    found = weights.open_weights(tmp_path)
    assert list(found.layouts) == ["word", "bias", "weight"]
    assert found.read("bias").tolist() == [8, 9]
    shutil.copy(GOLDEN / "pickled_zip.bin", tmp_path / "pytorch_model.bin")
    assert list(weights.open_weights(tmp_path).layouts) == list(NUMBERS)
    write_folder(tmp_path, {"x": Layout(np.dtype(np.int8), (1,))}, [np.int8([3])], 10)
    assert weights.open_weights(tmp_path).read("x").tolist() == [3]


def test_damaged_indices_are_named(tmp_path):
    """An index that is no index, and one that does not fit its shards."""
    index = shards(tmp_path)
    whole = index.read_text()
    cases = (
        ("[]", "no weight_map"),
        ("{", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "../1.bin"}}', "outside"),
        (whole.replace("word", "ward"), "lacks it"),
    )
    for text, message in cases:
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            pickled.open_folder(tmp_path)
    index.write_text(whole)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.bin"):
        pickled.open_folder(tmp_path)


def test_folders_without_weights_say_what_they_hold(tmp_path):
    """The cure depends on what is there."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.open_weights(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is empty"):
        weights.open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5").write_text("")
    with pytest.raises(FileNotFoundError, match=r"it holds config\.json, tf_model\.h5"):
        weights.open_weights(tmp_path)
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises(ValueError, match=r"a\.gguf.*convert"):
        weights.open_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        weights.open_weights(tmp_path)
