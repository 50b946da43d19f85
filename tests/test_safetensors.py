"""Safetensors that are damaged, changed behind our back, or many."""

import struct
import time

import numpy as np
import pytest

from collab_jax.io.layout import Layout
from collab_jax.io.region import SMALL, region
from collab_jax.io.safetensors import open_file, open_folder, write, write_folder

TWO = {
    name: Layout(np.dtype(kind), (3, 4)) for name, kind in (("a", "f4"), ("b", "i2"))
}


def made(folder):
    path = folder / "a.safetensors"
    write(path, TWO, [np.ones(x.shape, x.dtype) for x in TWO.values()])
    return path


def test_changed_bytes_give_an_error_or_numbers(tmp_path):
    """Never an exception of another kind, wherever the damage is."""
    path, rng = made(tmp_path), np.random.default_rng(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(160)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            found = open_file(path)
            for name in found.layouts:
                found.read(name)
        except ValueError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 3}',
        '{"a": {"dtype": "F32"}}',
        '{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
    ],
)
def test_headers_that_are_none(tmp_path, header):
    """JSON of another form is named as damage, with the file."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        open_file(path)


@pytest.mark.parametrize("size", [10, SMALL + 4096])
def test_a_file_that_shrinks_after_opening(tmp_path, size):
    """Reading says so, rather than to end the process."""
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    assert region(path, np.dtype(np.uint8), 0, (size,)).sum() == 0
    with pytest.raises(ValueError, match="changed meanwhile"):
        region(path, np.dtype(np.uint8), 1, (size,))


def test_twenty_thousand_tensors(tmp_path):
    """Opening and reading many small tensors is no work of its own."""
    layout, zero = Layout(np.dtype(np.float16), (4, 4)), np.zeros((4, 4), np.float16)
    many = {
        f"model.layers.{i // 400}.experts.{i % 400}.w": layout for i in range(20000)
    }
    write_folder(tmp_path, many, (zero for _ in many), 20000 * 4)
    start = time.process_time()
    found = open_folder(tmp_path)
    for name in many:
        found.read(name)
    assert time.process_time() - start < 2  # 0.3 s on an idle core
    assert list(found.layouts) == list(many)
