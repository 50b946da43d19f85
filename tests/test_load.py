"""Round trips of models and trees through the disk, and the line of every error."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from small_model import TEMPLATE, model, tokenizer

from collab_jax.io import canonical, checkpoint
from collab_jax.io import safetensors as disk
from collab_jax.io.load import load, save
from collab_jax.io.tokenizer import decode, encode, token_bytes


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def folder(tmp_path):
    return save(model(), tmp_path / "model")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [5_000_000_000, 3000])
def test_a_saved_model_comes_back_exactly(tmp_path, dtype, size):
    first = model(dtype)
    folder = save(first, tmp_path / "model", max_shard_size=size)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert (len(files) > 3) == (size == 3000)
    again = load(folder)
    same(again.params, first.params)
    assert again.config == first.config
    assert again.tokenizer.chat_template == TEMPLATE
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    for file in files:  # the reference implementation reads the same
        for name, tensor in safetensors.numpy.load_file(folder / file).items():
            found = disk.open_file(folder / file).read(name)
            np.testing.assert_array_equal(found, tensor)


def test_dtype_is_converted(folder):
    params = load(folder, dtype=jnp.bfloat16).params
    same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model().params))


def mesh_sharding():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("model",), axis_types=auto)

    def place(path, shape):
        split = path[-1] == "kernel" and shape[-1] % 2 == 0
        spec = PartitionSpec(None, "model") if split else PartitionSpec()
        return NamedSharding(mesh, spec)

    return place


def test_each_device_gets_its_slice(folder):
    place = mesh_sharding()
    params = load(folder, sharding=place).params
    same(params, load(folder).params)
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == place(("up", "kernel"), (16, 24))
    assert [s.data.shape for s in kernel.addressable_shards] == [(16, 12)] * 2
    whole = NamedSharding(kernel.sharding.mesh, PartitionSpec())
    assert load(folder, sharding=whole).params["norm"]["scale"].sharding == whole


def test_orbax_restores_exactly_and_into_shardings(tmp_path):
    params = model().params
    checkpoint.save_checkpoint(tmp_path / "a", params)
    same(checkpoint.load_checkpoint(tmp_path / "a"), params)
    place = mesh_sharding()

    def like(path, leaf):
        path = tuple(key.key for key in path)
        where = place(path, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    wanted = jax.tree_util.tree_map_with_path(like, params)
    sharded = checkpoint.load_checkpoint(tmp_path / "a", wanted)
    same(sharded, params)
    kernel = sharded["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 12)
    checkpoint.save_checkpoint(tmp_path / "b", sharded)
    same(checkpoint.load_checkpoint(tmp_path / "b", params), params)


def test_orbax_errors_are_one_line(tmp_path):
    params = {"a": {"b": jnp.ones((2, 3))}}
    checkpoint.save_checkpoint(tmp_path / "a", params)
    wrong = {"a": {"b": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match=r"a/b as \(2, 3\), expected was \(3, 3\)"):
        checkpoint.load_checkpoint(tmp_path / "a", wrong)
    with pytest.raises(ValueError, match=r"holds c as nothing|holds a/b"):
        checkpoint.load_checkpoint(tmp_path / "a", {"c": jnp.ones(2)})
    with pytest.raises(ValueError, match="exists"):
        checkpoint.save_checkpoint(tmp_path / "a", params)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load_checkpoint(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="no orbax checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "c")


def rewrite(folder, change):
    """Edits the tensors of a saved folder."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file(tensors, path)


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


NORM = "model.norm.weight"
DAMAGE = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        FileNotFoundError,
        "holds no config.json",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        FileNotFoundError,
        "holds no model.safetensors .* it holds pytorch_model.bin, convert that first",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        FileNotFoundError,
        "holds no tokenizer: expected was one of tokenizer.json",
    ),
    "damaged config": (
        lambda f: (f / "config.json").write_text('{"model_type": "lla'),
        ValueError,
        "config.json is not JSON",
    ),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="mamba"),
        ValueError,
        "unknown architecture 'mamba'.*known are .*llama",
    ),
    "wrong shape": (
        lambda f: edit_config(f, intermediate_size=25),
        ValueError,
        r"gate_proj.weight in .* the shape \[24, 16\], config.json implies \[25, 16\]",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: {k: v for k, v in t.items() if k != NORM}),
        ValueError,
        f"tensor {NORM} is missing from the checkpoint; the closest there is model",
    ),
    "unexpected tensor": (
        lambda f: rewrite(f, lambda t: t | {"model.extra": np.ones(2)}),
        ValueError,
        "holds 1 tensors that llama does not have, such as model.extra",
    ),
    "cut off in the data": (
        lambda f: cut(f, 9000),
        ValueError,
        r"has 9000 bytes, its header promises \d+: it is cut off",
    ),
    "cut off in the header": (
        lambda f: cut(f, 100),
        ValueError,
        "has 100 bytes and no",
    ),
    "empty": (lambda f: cut(f, 0), ValueError, "has 0 bytes and no complete"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(folder, case):
    harm, kind, line = DAMAGE[case]
    harm(folder)
    with pytest.raises(kind, match=line) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_missing_shard_and_a_wrong_index(tmp_path):
    folder = save(model(), tmp_path / "model", max_shard_size=3000)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    where = raw["weight_map"]
    good = index.read_text()
    where[NORM] = where["model.embed_tokens.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"places tensor {NORM} in .* which lacks it"):
        load(folder)
    index.write_text(good)
    (folder / json.loads(good)["weight_map"][NORM]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-000.* does not exist"):
        load(folder)


def test_unknown_type_in_a_header(tmp_path):
    header = {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"0")
    with pytest.raises(ValueError, match=r"tensor x in .* the unknown type F4; known"):
        disk.open_file(path)


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    first = model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: a model is saved to a new"):
        save(first, tmp_path / "full")
    lacking = {k: v for k, v in first.params.items() if k != "norm"}
    with pytest.raises(ValueError, match="params lack norm/scale"):
        save(first._replace(params=lacking), tmp_path / "a")
    more = first.params | {"extra": jnp.ones(2)}
    with pytest.raises(ValueError, match="params have 22 leaves, config asks for 21"):
        save(first._replace(params=more), tmp_path / "a")

    def broken(config, params):
        yield from list(canonical.save_tree(config, params))[:3]
        raise OSError("disk full")

    monkeypatch.setattr(
        "collab_jax.io.load._tensors",
        lambda m: (t for _, t in broken(m.config, m.params)),
    )
    with pytest.raises(OSError, match="disk full"):
        save(first, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_texts_chats_and_bytes():
    made = tokenizer()
    text = "the naïve 数 🙂\n"
    (ids,) = encode(made, [text])
    assert decode(made, [*ids, 257, 9999]) == text
    assert b"".join(token_bytes(made)[i] for i in ids) == text.encode()
    assert token_bytes(made)[257] == b""
    (ids,) = encode(made, ["hi"], chat=True, system="be kind")
    assert decode(made, ids) == "[system]be kind[user]hi[answer]"
    made.chat_template = None
    with pytest.raises(ValueError, match="no chat template: the model is a base model"):
        encode(made, ["hi"], chat=True)
