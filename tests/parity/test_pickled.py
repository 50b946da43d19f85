"""Checkpoints of torch against torch.load: every type, views, containers, both formats.

Run from the environment with torch: `pytest tests/parity/test_pickled.py`.
"""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch

from collab_jax.io import pickled, weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS += (torch.float8_e4m3fn, torch.float8_e5m2)
WHOLES = (torch.int64, torch.int32, torch.int16, torch.int8)
WHOLES += (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
TYPES = (*FLOATS, *WHOLES, torch.bool, torch.complex64, torch.complex128)
SHAPES = ((), (1,), (7,), (64, 48), (3, 3, 8, 8), (0, 3), (1, 5, 1))
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T,
    "column": lambda x: x[:, 3],
    "steps": lambda x: x[1::2, ::3],
    "tail": lambda x: x[-2:],
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
    "axes": lambda x: x.reshape(2, 4, 9).permute(2, 0, 1),
    "one": lambda x: x[2, 3],
    "none": lambda x: x[3:3],
}


def bits(tensor):
    """The bytes of a tensor, whatever numpy knows of its type."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if len(flat) else np.zeros(0, np.uint8)


def same(path):
    """Both read the same bytes, shapes and names."""
    expected = torch.load(path, weights_only=True)
    found = pickled.open_file(path)
    assert list(found.layouts) == list(expected)
    for name, tensor in expected.items():
        array = found.read(name)
        assert array.shape == tuple(tensor.shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        packed = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(packed, bits(tensor))
    return found


@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_and_shape(tmp_path, zipped):
    """Random bits as every type."""
    torch.manual_seed(0)
    made = {}
    # torch writes these to the older format, and cannot read them there itself
    recent = {torch.float8_e4m3fn, torch.float8_e5m2, *WHOLES[4:7]}
    for kind in TYPES:
        if kind in recent and not zipped:
            continue
        for shape in SHAPES:
            raw = torch.randint(0, 2 if kind == torch.bool else 256, (*shape, 16))
            raw = raw.to(torch.uint8)[..., : kind.itemsize].contiguous()
            made[f"{kind}{shape}"] = raw.view(kind).reshape(shape)
    path = tmp_path / "a.bin"
    torch.save(made, path, _use_new_zipfile_serialization=zipped)
    same(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_views_share_a_storage(tmp_path, zipped, kind):
    """Views of one tensor, saved together and alone."""
    whole = torch.arange(72).reshape(8, 9).to(kind)
    made = {name: view(whole) for name, view in VIEWS.items()}
    path = tmp_path / "a.bin"
    torch.save(made, path, _use_new_zipfile_serialization=zipped)
    same(path)
    for name, tensor in made.items():
        torch.save({name: tensor}, path, _use_new_zipfile_serialization=zipped)
        same(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_and_its_containers(tmp_path, zipped):
    """State dicts of modules, of parameters, and within the files of a training."""
    model = torch.nn.Sequential(
        OrderedDict(embed=torch.nn.Embedding(5, 4), norm=torch.nn.BatchNorm1d(4))
    )
    model.head = torch.nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight  # tied
    path = tmp_path / "a.pt"
    state = model.state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    same(path)
    found = pickled.open_file(path).read("embed.weight").tolist()
    optimizer = torch.optim.Adam(model.parameters())
    for key in ("state_dict", "model", "model_state_dict"):
        run = {"epoch": 3, key: state, "optimizer": optimizer.state_dict(), "k": None}
        torch.save(run, path, _use_new_zipfile_serialization=zipped)
        assert pickled.open_file(path).read("head.weight").tolist() == found
    torch.save(
        dict(model.named_parameters()), path, _use_new_zipfile_serialization=zipped
    )
    same(path)


def test_large_tensors_are_mapped(tmp_path):
    """Beyond the size that is read at once, at an offset that is no page's."""
    torch.manual_seed(0)
    made = {"a": torch.randn(3), "b": torch.randn(300, 301), "c": torch.randn(5, 7)}
    made["d"] = made["b"][7:, 11:]
    for zipped in (True, False):
        torch.save(made, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
        same(tmp_path / "a.bin")


def test_what_torch_would_not_store_is_refused(tmp_path):
    """A whole module, a conjugate view, a quantised tensor, a program."""
    path = tmp_path / "a.bin"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        pickled.open_file(path)
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, path)
    with pytest.raises(ValueError, match="conj"):
        pickled.open_file(path)
    torch.save({"a": torch.ones(2, 2).to_sparse()}, path)
    with pytest.raises(ValueError, match="_rebuild_sparse_tensor"):
        pickled.open_file(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match="a single tensor"):
        pickled.open_file(path)


def test_shards_of_transformers(tmp_path):
    """The index that transformers wrote for .bin files."""
    torch.manual_seed(0)
    made = {f"layers.{i}.weight": torch.randn(4, 5) for i in range(4)}
    where = {}
    for i in range(2):
        part = {name: made[name] for name in list(made)[2 * i : 2 * i + 2]}
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(part, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 320}, "weight_map": where}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = weights.open_weights(tmp_path)
    for name, tensor in made.items():
        np.testing.assert_array_equal(found.read(name), tensor.numpy())
