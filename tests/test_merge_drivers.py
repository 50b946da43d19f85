"""One merge, whichever driver runs it: in memory, sharded, streamed whole or in pieces.

Entries that follow from entries, masks and thresholds are equal to the last bit; what
follows from sums of floats (norms, inner products) is within 1e-6 of the largest input.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_tokenizers as small
from command_line import run
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax.io.safetensors import Layout, open_folder, write_folder
from collab_jax.merge import files, split
from collab_jax.merge.memory import merge
from collab_jax.merge.mergekit import METHODS, part
from collab_jax.merge.mergekit_table import TABLE
from collab_jax.merge.stream import Job, stream

KEY = jax.random.key(5)
SHAPES = {"x.weight": (40, 16), "y.bias": (40,), "z.weight": (40, 16)}
PIECES = (64,)  # entries
# knobs beside the weights; the same for all experts
EXACT = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.4, "rescale": False},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "della_linear": {"density": 0.5, "rescale": False},
    "ram": {},
    "nearswap": {"t": 0.1},
    "passthrough": {"scale": 0.3},
    "arcee_fusion": {},
}
SUMS = {
    "dare_linear": {"density": 0.4},
    "sce": {"select_topk": 0.5},
    "ramplus_tl": {},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
}
ALL = EXACT | SUMS
WEIGHTS = 0.7, 0.4


def models(name, seed=3):
    """A base and experts; of their deltas many are equal, within and across pieces."""
    draw = np.random.default_rng(seed)
    count = min(2, TABLE[name].most or 2)

    def tree(spread):
        return {
            n: (spread * np.round(4 * draw.standard_normal(s)) / 4).astype(np.float32)
            for n, s in SHAPES.items()
        }

    base = tree(2.0)
    deltas = [tree(1.0) for _ in range(count)]
    experts = [{n: base[n] + d[n] for n in d} for d in deltas]
    if METHODS[name].base == "none" and TABLE[name].base == "required":
        return None, [base, *experts]
    return (base if METHODS[name].base == "delta" else None), experts


def made(name):
    base, experts = models(name)
    return part(name, len(experts), ALL[name]), base, experts, WEIGHTS[: len(experts)]


def jobs(transform, base, experts, weights):
    def read(name):
        return lambda: (
            None if base is None else base[name],
            tuple(expert[name] for expert in experts),
        )

    count = len(experts) + (base is not None)
    return [
        Job(n, s, np.dtype(np.float32), transform, weights, read(n), ("?",) * count)
        for n, s in SHAPES.items()
    ]


def streamed(work, workers=1, key=KEY):
    found = {}
    stream(work, found.__setitem__, key, workers=workers)
    assert set(found) == set(SHAPES)
    return found


def equal(found, expected):
    return all(
        np.asarray(found[n]).tobytes() == np.asarray(expected[n]).tobytes()
        for n in SHAPES
    )


def close(found, expected, experts, label):
    for n in SHAPES:
        size = np.abs([expert[n] for expert in experts]).max(0)
        bar = 1e-6 * (np.abs(expected[n]) + size)
        assert (np.abs(found[n] - expected[n]) <= bar).all(), (label, n)


@pytest.fixture
def small_pieces(monkeypatch):
    """Leaves of a few hundred entries are cut into pieces."""
    monkeypatch.setattr(split, "SIZES", PIECES)


@pytest.mark.parametrize("name", ALL)
def test_streamed_is_in_memory(name, small_pieces):
    transform, base, experts, weights = made(name)
    whole = merge(transform, base, experts, weights, KEY)
    work = jobs(transform, base, experts, weights)
    one = streamed(work)
    assert equal(streamed(work[::-1], workers=4), one)  # to the last bit for all
    if name in EXACT:
        assert equal(one, whole)
    else:
        close(one, whole, [*experts, base or experts[0]], name)
    first = experts[0] if base is None else base
    assert not equal(one, first)


SHARDED = ("ties", "dare_ties", "slerp")


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_is_in_memory(name):
    transform, base, experts, weights = made(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))

    def spread(tree):
        return None if tree is None else jax.device_put(tree, rows)

    whole = merge(transform, base, experts, weights, KEY)
    parts = merge(transform, spread(base), [*map(spread, experts)], weights, KEY)
    assert all(parts[n].sharding.is_equivalent_to(rows, parts[n].ndim) for n in SHAPES)
    if name in EXACT:
        assert equal(parts, whole)
    else:
        close(parts, whole, [*experts, base or experts[0]], name)


def test_another_key_other_masks(small_pieces):
    """Control: the comparisons above would notice."""
    work = jobs(*made("dare_ties"))
    assert not equal(streamed(work, key=jax.random.key(6)), streamed(work))
    transform, base, experts, weights = made("dare_ties")
    renamed = [
        Job(f"{j.name}_", *j[1:]) for j in jobs(transform, base, experts, weights)
    ]
    found = {}
    stream(renamed, lambda n, x: found.__setitem__(n[:-1], x), KEY)
    assert not equal(found, streamed(work))


def test_ties_across_pieces(small_pieces):
    """Exactly k stay where all are equal: the first, wherever a piece ends."""
    base = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    expert = {n: np.ones(s, np.float32) for n, s in SHAPES.items()}
    work = jobs(part("ties", 1, {"density": 0.3}), base, [expert], (1.0,))
    found = streamed(work)
    for n, shape in SHAPES.items():
        size = int(np.prod(shape))
        expected = np.arange(size) < int(0.3 * size)
        assert (found[n].reshape(-1) == expected).all()


def save(folder, tree, dtype=np.float32):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    layouts = {n: Layout(np.dtype(dtype), x.shape) for n, x in tree.items()}
    write_folder(folder, layouts, (x.astype(dtype) for x in tree.values()), 10**9)


CONFIG = """
merge_method: METHOD
base_model: base
models: [{model: one, parameters: {weight: 0.7}}, {model: two}]
parameters: {weight: 0.4, density: 0.4}
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    base, (one, two) = models("dare_ties")
    for name, tree in (("base", base), ("one", one), ("two", two)):
        save(tmp_path / name, tree)
    monkeypatch.chdir(tmp_path)
    return base, [one, two]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_files_are_trees(method, folders, small_pieces):
    """A YAML file, shards and three threads: what `merge` makes of the trees."""
    base, experts = folders
    knobs = {"density": 0.4, "normalize": method == "ties"}
    whole = merge(part(method, 2, knobs), base, experts, WEIGHTS, jax.random.key(9))
    recipe = files.prepare(CONFIG.replace("METHOD", method))
    files.run(recipe, "out", seed=9, max_shard_size=1000)
    assert Path("out/model.safetensors.index.json").exists()
    found = open_folder("out")
    found = {n: found.read(n) for n in SHAPES}
    if method == "ties":
        assert equal(found, whole)
    else:
        close(found, whole, [base, *experts], method)
        assert all(((found[n] == base[n]) == (whole[n] == base[n])).all() for n in base)


def test_the_seed_changes_masks_and_nothing_else(folders):
    def bytes_of(method, seed):
        text = CONFIG.replace("METHOD", method)
        if method == "linear":
            text = text.replace("base_model: base\n", "")
        out = f"{method}-{seed}"
        files.run(files.prepare(text), out, seed=seed)
        return Path(f"{out}/model.safetensors").read_bytes()

    assert bytes_of("linear", 0) == bytes_of("linear", 1)
    assert bytes_of("dare_ties", 0) != bytes_of("dare_ties", 1)


def test_float64(tmp_path, monkeypatch):
    """In 64 bits where they are switched on, and else named in the plan."""
    draw = np.random.default_rng(0)
    trees = [{n: draw.standard_normal(s) for n, s in SHAPES.items()} for _ in range(3)]
    for name, tree in zip(("base", "one", "two"), trees, strict=True):
        save(tmp_path / name, tree, np.float64)
    monkeypatch.chdir(tmp_path)
    base, one, two = trees
    recipe = files.prepare(CONFIG.replace("METHOD", "task_arithmetic"))
    told = [line for line in files.summary(recipe) if "float64" in line]
    assert len(told) == 1
    assert "3 tensors, such as x.weight, are float64" in told[0]
    with jax.enable_x64(True):
        assert not [line for line in files.summary(recipe) if "float64" in line]
        files.run(recipe, "wide")
    files.run(recipe, "narrow")
    for out, bar in (("wide", 1e-14), ("narrow", 1e-6)):
        found = open_folder(out)
        gap = 0.0
        for n in SHAPES:
            expected = base[n] + 0.7 * (one[n] - base[n]) + 0.4 * (two[n] - base[n])
            assert found.layouts[n].dtype == np.float64
            gap = max(gap, np.abs(found.read(n) - expected).max())
        assert gap <= bar
        assert out == "wide" or gap > 1e-9


@pytest.fixture
def llamas(tmp_path, monkeypatch):
    for seed, name in enumerate(("base", "one", "two")):
        small.write_llama(tmp_path / name, small.first(), seed)
    (tmp_path / "merge.yml").write_text(CONFIG.replace("METHOD", "dare_ties"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run(llamas):
    before = sorted(llamas.rglob("*"))
    result = run("merge", "merge.yml", "--dry-run")
    assert result.exit_code == 0, result.stderr
    plan = result.stdout.splitlines()
    assert plan[0] == "dare_ties of 3 models: base (the base), one, two"
    assert "  21 tensors by dare_ties" in plan
    assert plan[-1].startswith("  memory: at most ")
    told = run("merge", "merge.yml", "out", "--dry-run", "--json")
    found = json.loads(told.stdout)
    assert found == {"plan": plan, "tensors": 21, "bytes": found["bytes"]}
    assert told.stderr == ""
    assert sorted(llamas.rglob("*")) == before


def test_json(llamas):
    result = run("merge", "merge.yml", "out", "--json", "--seed", "7")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) == {"out", "tensors", "bytes", "seconds", "notes"}
    written = open_folder(llamas / "out")
    sizes = [x.dtype.itemsize * np.prod(x.shape) for x in written.layouts.values()]
    assert (found["tensors"], found["bytes"]) == (len(sizes), sum(sizes))
    card = (llamas / "out/README.md").read_text()
    assert "seed" in card
    assert "7" in card
    recipe = (llamas / "out/mergekit_config.yml").read_text()
    assert recipe == (llamas / "merge.yml").read_text()
    assert sorted(p.name for p in llamas.iterdir() if p.name.startswith(".")) == []


def test_without_json(llamas):
    """The plan and the notes go to stderr, one line with the result to stdout."""
    result = run("merge", "merge.yml", "out", "--workers", "1")
    assert result.exit_code == 0, result.stderr
    [line] = result.stdout.splitlines()
    assert line.startswith("out: 21 tensors in ")
    assert result.stderr.startswith("dare_ties of 3 models: base (the base), one, two")
