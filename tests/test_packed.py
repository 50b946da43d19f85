"""Packed and rounded parameters in place of plain ones: models, files, merges."""

import json

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from command_line import generate, refused, run
from small_model import model
from test_transformer import build, jitted, same

from collab_jax import combine, decode, finetune, native, pool, testing, tree
from collab_jax.io import canonical, checkpoint
from collab_jax.io.load import load, save
from collab_jax.lm import language_model
from collab_jax.merge import memory
from collab_jax.merge.stack import chain
from collab_jax.models import layout, linear, lora, marian, parallel_heads
from collab_jax.models.marian_config import MarianConfig
from collab_jax.models.packed import Packed, pack, unpack

KINDS = "packed", "bfloat16", "int8"
# a tied embedding and biases; learned positions; experts, untied
CASES = [
    ("llama3_tied_biased", "packed"),
    ("gpt2", "bfloat16"),
    ("qwen3_moe", "int8"),
]


def is_packed(node):
    return isinstance(node, Packed)


def matrices(params):
    """The packed leaves of a tree, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    return {tree.path_string(path): leaf for path, leaf in flat if is_packed(leaf)}


def expected(params, kind):
    """The plain parameters with the numbers that packing leaves."""
    return unpack(pack(params, kind), rounded=True)


def equal(first, other):
    assert jax.tree.structure(first) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_takes_packed_parameters(name, kind):
    config, params, backbone = build(name)
    lm = jitted(language_model(backbone))
    tokens = jnp.asarray(families.batch(config)[0][:2, :9])
    small = pack(params, kind)
    wanted, state = lm.extend(expected(params, kind), lm.init(params, 2, 16), tokens)
    found, own = lm.extend(small, lm.init(small, 2, 16), tokens)
    same(found.logits, wanted.logits)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, state)
    assert own.k[0].dtype == state.k[0].dtype == jnp.float32
    if kind == "int8":  # the rounding shows, so the numbers above are those of int8
        plain, _ = lm.extend(params, lm.init(params, 2, 16), tokens)
        rounded, _ = lm.extend(small, lm.init(small, 2, 16), tokens)
        with pytest.raises(AssertionError):
            same(rounded.logits, plain.logits)


def test_what_is_packed():
    _, params, _ = build("qwen3_moe")
    found = matrices(pack(params, "int8"))
    assert {path.split("/", 1)[-1] for path in found if path[:6] == "layers"} == {
        *(f"attention/{part}/kernel" for part in "qkvo"),
        *(f"mlp/{part}/kernel" for part in ("gate", "up", "down")),  # a dense layer
        *(f"mlp/experts/{part}" for part in ("gate", "up", "down")),
    }
    assert "head/kernel" in found
    assert "embed/embedding" not in found  # another matrix is the head
    _, tied, _ = build("llama3_tied_biased")
    assert "embed/embedding" in matrices(pack(tied, "int8"))
    if native.available():
        assert matrices(pack(tied)).keys() == matrices(pack(tied, "int8")).keys()
    else:
        assert not matrices(pack(tied))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 32), (2, 4, 70), (6, 0)])
def test_packing_is_undone_exactly(dtype, shape):
    drawn = jax.random.normal(jax.random.key(0), shape, dtype)
    params = {"embed": {"embedding": drawn}, "up": {"kernel": drawn, "bias": drawn}}
    equal(unpack(pack(params)), params)
    for leaf, path in zip(
        matrices(pack(params)).values(), ("embed", "up"), strict=False
    ):
        assert leaf.shape == shape, path
        assert leaf.dtype == dtype
    if dtype == jnp.bfloat16:
        equal(unpack(pack(params, "bfloat16")), params)
    tokens = jnp.array([[1, 0], [0, 1]])
    if len(shape) == 2 and native.available():
        rows = linear.lookup(tokens, pack(params)["embed"]["embedding"])
        equal(rows, linear.lookup(tokens, drawn))


def test_int8_rounds_by_half_a_step():
    matrix = np.random.default_rng(0).standard_normal((60, 40)).astype(np.float32)
    matrix[:, 3] = 0
    leaf = pack({"kernel": jnp.asarray(matrix)}, "int8")["kernel"]
    step = np.abs(matrix).max(0) / 127
    assert np.all(np.abs(leaf.unpack() - matrix) <= step * 0.5001)
    assert np.all(np.asarray(leaf.unpack())[:, 3] == 0)
    largest = np.abs(np.asarray(leaf.unpack())).max(0)
    np.testing.assert_allclose(largest, np.abs(matrix).max(0), rtol=1e-6)


@pytest.mark.slow
def test_the_laws_of_an_lm():
    small = model()
    testing.check_lm(small.lm, pack(small.params, "int8"), 258, batch=2, jit=True)


def test_greedy_text_is_the_same():
    small = model()
    prompt, length = decode.pad([[3, 4, 5, 6], [7, 8]])
    program = decode.compile(lambda _: decode.greedy(small.lm, 12))
    key = jax.random.key(0)
    plain = program(None, small.params, prompt, length, key)
    fast = program(None, pack(small.params), prompt, length, key)
    np.testing.assert_array_equal(plain.tokens, fast.tokens)


def test_stacked_members():
    kind, first = "int8", model().params
    second = jax.tree.map(lambda leaf: leaf * 1.1, first)
    lm = combine.stacked(model().lm, 2, pool.linear(0.5, 0.5))
    both = tree.stack([first, second])
    small = tree.stack([pack(first, kind), pack(second, kind)])
    plain = tree.stack([expected(first, kind), expected(second, kind)])
    equal(small, pack(both, kind))
    tokens = jnp.array([[5, 6, 7]])
    extend = jax.jit(lm.extend)
    found, _ = extend(small, lm.init(small, 1, 8), tokens)
    wanted, _ = extend(plain, lm.init(plain, 1, 8), tokens)
    same(found.logits, wanted.logits)


def test_an_adapter_over_packed_kernels():
    params = model().params
    adapter = lora.init(jax.random.key(1), params, 2)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    tokens, lm = jnp.array([[5, 6, 7]]), model().lm
    extend = jax.jit(lm.extend)
    found, wanted = (
        extend(lora.apply(tree_, adapter, 0.5), lm.init(params, 1, 8), tokens)[0]
        for tree_ in (pack(params), params)
    )
    same(found.logits, wanted.logits)
    if native.available():
        with pytest.raises(ValueError, match="is packed and cannot be merged with"):
            lora.materialise(pack(params), adapter, 0.5)


def test_a_translation_model_keeps_the_type_of_its_cache():
    config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    params, lm = marian.init(jax.random.key(0), config), marian.translator(config)
    source = jnp.array([[3, 4, 0]]), jnp.array([3])

    @jax.jit
    def read(params):
        own = (params, *source)
        out, state = lm.extend(own, lm.init(own, 1, 4), jnp.array([[8, 1]]))
        return out.logits, state.cache.k[0]

    found, wanted = read(pack(params, "int8")), read(expected(params, "int8"))
    same(found[0], wanted[0])
    assert found[1].dtype == wanted[1].dtype == jnp.float32


def test_training_refuses_packed_parameters():
    small = pack(model().params, "int8")
    tuner = finetune.finetuner(model().backbone, optax.sgd(0.1))
    with pytest.raises(ValueError, match="is packed and cannot be trained: load the"):
        tuner.init(small)
    with pytest.raises(ValueError, match="is packed and cannot be measured"):
        lora.init(jax.random.key(0), small, 2)


def test_heads_over_a_packed_model():
    params, backbone = model().params, model().backbone
    heads = parallel_heads.medusa(backbone, 2)
    own = heads.init(jax.random.key(1), params)
    assert heads.init(jax.random.key(1), pack(params)).keys() == own.keys()
    hidden = jax.random.normal(jax.random.key(2), (3, 16))
    found = heads.apply(pack(own), pack(params), hidden)
    same(found, heads.apply(own, params, hidden))


def test_several_devices_keep_plain_matrices():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put({"up": {"kernel": jnp.ones((4, 6))}}, where)
    assert pack(params, "int8")["up"]["kernel"] is params["up"]["kernel"]


def test_wrong_arguments():
    params = model().params
    with pytest.raises(ValueError, match=r"kind = 'int4': one of packed, bfloat16"):
        pack(params, "int4")
    for number in jnp.inf, jnp.nan:
        with pytest.raises(
            ValueError, match="up/kernel holds numbers that are not fin"
        ):
            pack({"up": {"kernel": jnp.ones((4, 6)).at[1, 2].set(number)}}, "int8")
    with pytest.raises(ValueError, match="is packed and cannot be packed again"):
        pack(pack(params, "int8"), "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(model(), tmp_path_factory.mktemp("packed") / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_loading(folder, kind):
    equal(load(folder, matrices=kind).params, pack(model().params, kind))


def test_loading_over_devices_is_refused(folder):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    with pytest.raises(ValueError, match="matrices='int8' packs matrices for one"):
        load(folder, sharding=place, matrices="int8")


def test_saving_unpacks(folder, tmp_path):
    found = save(load(folder, matrices="packed"), tmp_path / "again")
    name = "model.safetensors"
    assert (found / name).read_bytes() == (folder / name).read_bytes()
    half = load(folder, dtype=jnp.bfloat16, matrices="bfloat16")
    equal(load(save(half, tmp_path / "half")).params, unpack(half.params))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounded_matrices_are_not_saved(folder, tmp_path, kind):
    small = load(folder, matrices=kind)
    reason = f"was float32 and is rounded to {kind}: load the model without matrices="
    with pytest.raises(ValueError, match=reason):
        save(small, tmp_path / "no")
    with pytest.raises(ValueError, match=reason):
        unpack(small.params)
    with pytest.raises(ValueError, match=reason):
        canonical.to_checkpoint(small.config, small.params)
    with pytest.raises(ValueError, match="is packed and cannot be saved"):
        checkpoint.save_checkpoint(tmp_path / "no", small.params)
    assert not list(tmp_path.iterdir())
    whole = small._replace(params=unpack(small.params, rounded=True))
    again = load(save(whole, tmp_path / "yes"), matrices=kind)
    equal(again.params, small.params)


def test_a_merge_sees_plain_trees():
    params = model().params
    small = pack(params, "int8")
    with pytest.raises(ValueError, match="packed and cannot be merged: load"):
        memory.merge(chain(), small, [small])
    with pytest.raises(ValueError, match="is packed and cannot be merged"):
        memory.merge(chain(), params, [small])
    merge = canonical.canonically(model().config, memory.merge)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    plain = merge(chain(), params, [other], [0.5])
    equal(merge(chain(), pack(params), [pack(other)], [0.5]), plain)


def test_generate(tiny):
    prompt = ["--prompt", "the cat", "--max-new-tokens", 6]
    (plain,) = generate(tiny, *prompt)
    (found,) = generate(tiny, *prompt, "--matrices", "packed")
    assert found["tokens"] == plain["tokens"]
    (small,) = generate(tiny, *prompt, "--matrices", "int8")
    (drafted,) = generate(tiny, *prompt, "--matrices", "int8", "--draft", "ngram")
    assert drafted["tokens"] == small["tokens"]


def test_other_matrices_are_another_run(tiny, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "the"}) + "\n")
    files = ["--input", prompts, "--output", out, "--max-new-tokens", 2]
    assert run("generate", tiny, *files, "--matrices", "int8").exit_code == 0
    assert run("generate", tiny, *files, "--matrices", "int8").exit_code == 0
    assert "matrices" in refused("generate", tiny, *files)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_panels_hold_every_number_where_it_is_looked_for(dtype, native):
    draw = np.random.default_rng(0).integers
    for depth, size, columns in ((1, 1, 32), (5, 33, 32), (6, 70, 32), (7, 9, 4)):
        whole = draw(-127, 128, (2, depth, size)).astype(dtype)
        laid = jnp.asarray(layout.lay(whole, columns, native))
        assert layout.held(laid) == whole.dtype
        wide = whole.astype(np.float32)
        np.testing.assert_array_equal(layout.matrix(laid, size), wide)
        chosen = draw(0, size, (3, 2))
        found = layout.columns(laid[0], jnp.asarray(chosen))
        np.testing.assert_array_equal(found, wide[0].T[chosen])
