"""What crosses a mesh of eight devices, read off the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_mesh as meshes

from collab_jax import beam, decode, finetune, mesh, score, warp
from collab_jax.collectives import collectives, table
from collab_jax.cooperate.efficient import exact, ngram, recycle, speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.merge import averages, recipes
from collab_jax.merge.memory import merge
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import transformer
from collab_jax.packing import Batch

NEW, CHUNK = 6, 4
WIDTH, LAYERS, VOCAB = 32, 2, 48
ROWS = len(meshes.PROMPTS)
KEYS = jax.random.split(jax.random.key(1), ROWS)
TEXT = (*decode.pad(meshes.PROMPTS), KEYS)


def arranged(name, data, model, rules=None):
    """(lm, parameters on a mesh, prompts on it, the mesh)."""
    lm, params = meshes.model(name)
    devices = mesh.make_mesh(data=data, model=model)
    config = from_hf(meshes.FAMILIES[name])
    rules = mesh.for_model(config, devices, "model") if rules is None else rules
    place = mesh.rows(devices, "data")
    return lm, mesh.shard(params, devices, rules), jax.device_put(TEXT, place), devices


def read(run, *arguments):
    """The exchanges of a program, and what it gives."""
    compiled = jax.jit(run).lower(*arguments).compile()
    return collectives(compiled.as_text()), compiled(*arguments)


def decoded(make):
    def run(params, prompt, length, keys):
        return decode.run(make, params, prompt, length, keys)

    return run


def largest(found, kind):
    return max((each.size for each in found if each.kind == kind), default=0)


def says_done(each):
    """The one thing that rows tell each other: whether all are done."""
    return each.kind == "all-reduce" and each.size == 1 and "/while/cond" in each.place


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_on_a_mesh_meet_only_at_the_end_of_a_turn(drawn):
    lm, params, text, _ = arranged("llama", 8, 1)
    warped = warp.warp(lm, warp.top_p(0.8))
    make = decode.sample(warped, NEW) if drawn else decode.greedy(lm, NEW, chunk=CHUNK)
    found, _ = read(decoded(make), params, *text)
    assert found, "a loop over rows on eight devices has to ask whether all are done"
    assert all(map(says_done, found)), table(found)


def test_scores_of_rows_cross_nothing():
    lm, params, (prompt, length, _), _ = arranged("llama", 8, 1)

    def run(params, tokens, length):
        return score.score(lm, params, tokens, length, CHUNK)

    found, _ = read(run, params, prompt, length)
    assert not found, table(found)


@pytest.mark.parametrize(
    ("name", "data", "model"),
    [*((name, 1, 8) for name in meshes.FAMILIES), ("llama", 2, 4), ("mixtral", 2, 4)],
)
def test_a_layer_on_many_devices_needs_two_sums(name, data, model):
    lm, params, text, _ = arranged(name, data, model)
    found, _ = read(decoded(decode.greedy(lm, NEW, chunk=CHUNK)), params, *text)
    looped = [each for each in found if each.looped]
    rows = ROWS // data
    hidden = [each for each in looped if (rows, 1, WIDTH) in each.shapes]
    # two of each layer and one of the embedding; those of a mixture may be flat
    flat = [each for each in looped if (rows, WIDTH) in each.shapes]
    assert {each.kind for each in (*hidden, *flat)} == {"all-reduce"}, table(found)
    assert len(hidden) + len(flat) == 2 * LAYERS + 1, table(found)
    # the rest finds the best token: a number or two of each row and device
    rest = [each for each in looped if each not in (*hidden, *flat)]
    assert all(each.size <= 8 * rows * model for each in rest if not says_done(each)), (
        table(rest)
    )
    # nothing else is sent for prompts, whose pieces are CHUNK tokens
    once = [each for each in found if not each.looped and "top_k" not in each.place]
    assert all(each.size == 4 * rows * CHUNK * WIDTH for each in once), table(once)


def test_heads_on_two_devices_gather_the_cache():
    """The control: a table that cuts four heads into eight parts."""
    lm, params, text, _ = arranged("llama", 1, 8, mesh.tensor_parallel("model"))
    found, _ = read(decoded(decode.greedy(lm, NEW, chunk=CHUNK)), params, *text)
    looped = [each for each in found if each.looped]
    slots = decode.pad(meshes.PROMPTS)[0].shape[1] + NEW
    assert largest(looped, "all-gather") >= 4 * ROWS * slots, table(found)


def test_heads_that_cannot_be_split_are_refused():
    devices = mesh.make_mesh(data=1, model=8)
    config = from_hf({**meshes.FAMILIES["llama"], "num_attention_heads": 12})
    with pytest.raises(ValueError, match="12 heads cannot be split over 8 devices"):
        mesh.for_model(config, devices, "model")


DECODERS = {
    "greedy": lambda lm: decode.greedy(lm, NEW, chunk=CHUNK, eos=(3,)),
    "beams": lambda lm: beam.search(lm, NEW, 3, eos=(3,), chunk=CHUNK),
    "drafts": lambda lm: speculate.speculate(
        on_lm(lm, CHUNK), ngram.ngram(3), NEW, verifier=exact.greedy()
    ),
    "trees": lambda lm: speculate.speculate(
        on_lm(lm, CHUNK),
        recycle.recycle_tree(((0,), (1,), (0, 0)), VOCAB),
        NEW,
        verifier=exact.greedy(),
    ),
}
DRAFTED = {"drafts", "trees"}


def owned(name, params):
    """Parameters as the strategy takes them: drafts have their own."""
    return (params, ()) if name in DRAFTED else params


@pytest.mark.parametrize("name", DECODERS)
def test_rows_apart_cross_nothing(name):
    lm, params, text, devices = arranged("llama", 8, 1)
    run = decoded(DECODERS[name](lm))
    found, many = read(mesh.by_rows(run, devices, "data"), owned(name, params), *text)
    assert not found, table(found)
    one = jax.jit(run)(owned(name, meshes.model("llama")[1]), *TEXT)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_array_equal(many.length, one.length)
    np.testing.assert_allclose(many.scores, one.scores, atol=1e-5)


def test_beams_that_are_not_apart_gather_the_cache():
    """The control."""
    lm, params, text, _ = arranged("llama", 8, 1)
    found, _ = read(decoded(DECODERS["beams"](lm)), params, *text)
    slots = decode.pad(meshes.PROMPTS)[0].shape[1] + NEW
    looped = [each for each in found if each.looped]
    assert largest(looped, "all-gather") >= 4 * ROWS * 3 * slots * WIDTH


@pytest.mark.parametrize("name", DECODERS)
def test_rows_apart_with_split_parameters(name):
    lm, params, text, devices = arranged("llama", 2, 4)
    run = mesh.by_rows(decoded(DECODERS[name](lm)), devices, "data")
    found, many = read(run, owned(name, params), *text)
    one = jax.jit(decoded(DECODERS[name](lm)))(
        owned(name, meshes.model("llama")[1]), *TEXT
    )
    np.testing.assert_array_equal(many.tokens, one.tokens)
    # no cache, and of logits not more than those of the beams, or of the nodes
    assert largest(found, "all-gather") <= 4 * ROWS // 2 * 4 * VOCAB, table(found)


def test_rows_that_do_not_fit_are_refused():
    devices = mesh.make_mesh(data=8)
    run = mesh.by_rows(lambda _, x: x, devices, "data")
    with pytest.raises(
        ValueError, match=r"shape \(6,\) cannot be split by rows over 8"
    ):
        run((), jnp.zeros(6))


def test_tuning_on_rows_sums_gradients_and_equals_one_device():
    config = from_hf(meshes.FAMILIES["llama"])
    _, params, (tokens, length, _), devices = arranged("llama", 8, 1)
    tuner = finetune.finetuner(transformer(config), optax.sgd(0.1), chunk=CHUNK)
    weights = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.float32)
    weights = jax.device_put(weights, mesh.rows(devices, "data"))
    tuned = tuner.init(params)
    found, (after, info) = read(
        lambda tuned, batch: tuner.step((), tuned, batch), tuned, Batch(tokens, weights)
    )
    assert {each.kind for each in found} == {"all-reduce"}, table(found)
    alone = tuner.init(meshes.model("llama")[1])
    batch = jax.device_get(Batch(tokens, weights))
    one, told = jax.jit(lambda t, b: tuner.step((), t, b))(alone, batch)
    np.testing.assert_allclose(info.loss, told.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_tuning_of_split_parameters_equals_one_device():
    config = from_hf(meshes.FAMILIES["llama"])
    _, params, (tokens, length, _), _ = arranged("llama", 2, 4)
    tuner = finetune.finetuner(transformer(config), optax.adamw(1e-3), chunk=CHUNK)
    weights = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.float32)
    _, (after, _) = read(
        lambda tuned, batch: tuner.step((), tuned, batch),
        tuner.init(params),
        Batch(tokens, weights),
    )
    kernel = after.params["layers_0"]["mlp"]["up"]["kernel"]
    assert (
        kernel.sharding.spec == params["layers_0"]["mlp"]["up"]["kernel"].sharding.spec
    )
    batch = jax.device_get(Batch(tokens, weights))
    one, _ = jax.jit(lambda t, b: tuner.step((), t, b))(
        tuner.init(meshes.model("llama")[1]), batch
    )
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


MERGES = {
    "linear": recipes.task_arithmetic(0.5),
    "ties": recipes.ties(0.4),
    "dare": recipes.dare(0.4),
    "della": recipes.della(0.5, 0.2),
    "breadcrumbs": recipes.breadcrumbs(0.8, 0.1),
    "sce": averages.sce(0.5),
    "model stock": averages.model_stock(),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_split_experts_moves_no_leaf(name):
    _, base, _, devices = arranged("llama", 1, 8)
    rules = mesh.for_model(from_hf(meshes.FAMILIES["llama"]), devices, "model")
    # a layer stands for all
    base = {name: base[name] for name in ("layers_0", "embed")}
    experts = [
        {
            name: mesh.shard(meshes.model("llama", seed)[1], devices, rules)[name]
            for name in base
        }
        for seed in (1, 2)
    ]
    part, key = MERGES[name], jax.random.key(3)
    found, many = read(
        lambda base, experts: merge(part, base, experts, key=key), base, experts
    )
    sorts = [each for each in found if each.kind == "all-to-all"]
    assert all(each.place.endswith("/sort") for each in sorts), table(found)
    assert name == "della" or not sorts  # which ranks rows, each as a whole
    for each in found:
        # counts of magnitudes, sums, a number of each row
        assert each in sorts or all(len(shape) <= 1 for shape in each.shapes), each
    if name in ("linear", "dare"):
        assert not found, table(found)
    one = merge(part, *jax.device_get((base, experts)), key=key)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_threshold_by_sorting_moves_leaves():
    """The control: a leaf is made flat, and every device gets all of it."""
    _, base, _, _ = arranged("llama", 1, 8)
    kernel = base["layers_0"]["mlp"]["up"]["kernel"]
    found, _ = read(lambda x: x >= jnp.sort(x.reshape(-1))[9], kernel)
    assert any(len(shape) > 1 for each in found for shape in each.shapes), table(found)
