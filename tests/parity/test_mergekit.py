"""Every method of mergekit 0.1.5 against mergekit itself, tensor by tensor.

Its random masks are ours, put in its place; where it leaves ties to an unstable sort,
its sorts are made stable. Everything else runs as installed.
"""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.merge import magnitude, noise, rank, sparsify, spherical
from collab_jax.merge.mergekit import METHODS
from collab_jax.merge.mergekit_table import REQUIRED, TABLE
from collab_jax.merge.stack import combine, lift, stack_leaf

torch = pytest.importorskip("torch")
api = pytest.importorskip("mergekit.merge_methods.api")

stable_sort = functools.partial(torch.sort, stable=True)
SHAPES = ((), (1,), (7,), (64, 48), (3, 3, 8, 8))
WEIGHTS = (0.7, 0.2, 0.45, 1.1, 0.33)
KEY = jax.random.key(7)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# knobs of each method: lists are the experts' own, cut to their number
DENSITIES = [0.5, 0.9, 0.31, 0.62, 1.0], [0.01, 0.1, 1.0, 0.0, 0.3]
SIGNS = [0.7, -0.2, 0.45, -1.1, 0.33]
GRID: dict[str, list[dict]] = {
    "linear": [{}, {"normalize": False}, {"weight": [0.3, 1.5, 0.0, -0.1, 2.0]}],
    "slerp": [{"t": t} for t in (0.0, 0.3, 0.5, 1.0, -0.2)],
    "nuslerp": [
        {},
        {"weight": [1.0, -1.0]},
        {"weight": [0.0, 1.0]},
        {"nuslerp_flatten": False},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{}, {"normalize_weights": False}, {"eps": 1e-4}],
    "karcher": [{}, {"max_iter": 1}, {"max_iter": 0}, {"tol": 1e-3}],
    "task_arithmetic": [{}, {"normalize": True}, {"lambda": 0.3}, {"weight": SIGNS}],
    "ties": [{"density": d} for d in (*DENSITIES, 1.0)]
    + [
        {"density": 0.4, "normalize": False, "lambda": 1.4},
        {"density": 0.4, "weight": SIGNS},
        {"density": DENSITIES[0], "rescale": True},
    ],
    "dare_linear": [{"density": d} for d in (*DENSITIES, 1.0)]
    + [{"density": 0.4, "rescale": False}, {"density": 0.4, "normalize": True}],
    "dare_ties": [{"density": d} for d in DENSITIES]
    + [{"density": 0.4, "rescale": False, "weight": SIGNS}],
    "breadcrumbs": [{"density": d} for d in (*DENSITIES, 1.0)]
    + [
        {"density": 0.6, "gamma": [0.0, 0.1, 0.3, 0.5, 0.9]},
        {"density": 0.6, "gamma": 0.2, "rescale": True, "normalize": True},
    ],
    "breadcrumbs_ties": [{"density": d} for d in DENSITIES]
    + [{"density": 0.6, "gamma": 0.2, "normalize": True, "weight": SIGNS}],
    "della": [
        {"density": [0.5, 0.8, 0.3, 1.0, 0.0]},
        {"density": 0.4, "epsilon": 0.1},
        {"density": 0.4, "rescale": False, "weight": SIGNS},
    ],
    "della_linear": [
        {"density": [0.5, 0.8, 0.3, 1.0, 0.0]},
        {},
        {"density": 0.4, "epsilon": [0.1, 0.2, 0.3, 0.01, 0.0], "normalize": True},
    ],
    "sce": [{}, *({"select_topk": k} for k in (0.7, 0.1, 0.001, 0.0))],
    "ram": [{}, {"epsilon": 0.1}],
    "ramplus_tl": [{}, {"epsilon": 0.1}, {"epsilon": 0.2, "r": 0.5, "alpha": 1.0}],
    "model_stock": [{}, {"filter_wise": True}],
    "nearswap": [{"t": 0.01}, {"t": 0.2}, {"t": 0.0}],
    "arcee_fusion": [{}],
    "passthrough": [{}, {"scale": 0.3}],
}


def counts(name):
    """How many deltas the method takes; 1 to 5 where it takes any number."""
    if name in ("slerp", "nearswap", "arcee_fusion", "nuslerp"):
        return [2]
    if name == "passthrough":
        return [1]
    return [2, 3, 4, 5] if name == "model_stock" else [1, 2, 3, 4, 5]


def draw(shape, count, seed):
    """A base and models near it, float64."""
    rng = np.random.default_rng(seed)
    base, common = rng.standard_normal((2, *shape))
    own = rng.standard_normal((count, *shape))
    sizes = 0.1 * (np.arange(count) + 1)
    return base, [base + s * (common + x) for s, x in zip(sizes, own, strict=True)]


def resolve(name, given, count):
    """All knobs of the method, and the weights."""
    spec, knobs = TABLE[name], {}
    for knob, parameter in (spec.per_source | spec.shared).items():
        value = given.get(knob, parameter.default)
        if value is REQUIRED and knob == "weight":
            value = list(WEIGHTS)
        if knob in spec.per_source:
            value = value[:count] if isinstance(value, list) else [value] * count
            value = tuple(value)
        knobs[knob] = value
    return knobs, knobs.get("weight", (1.0,) * count)


@pytest.fixture(autouse=True, scope="module")
def small_programs():
    """Parts run operation by operation here: what all of them share is compiled once.

    Selection sees two sizes, filled with zeros. `test_compiled` runs each method as one
    program, `tests/test_mergekit.py` as users do, in their shapes.
    """
    plain = magnitude.cuts
    cut = jax.jit(lambda x, k: plain([x], [k])[0])
    take = jax.jit(magnitude.first)

    def fill(x):
        x = jnp.asarray(x).reshape(-1)
        return jnp.pad(x, (0, (8 if x.size <= 8 else 3072) - x.size))

    def cuts(xs, ks):
        return [cut(fill(x), k) for x, k in zip(xs, ks, strict=True)]

    def first(mask, count):
        return take(fill(mask), count)[: mask.size].reshape(mask.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitude, "cuts", cuts)
        patch.setattr(magnitude, "first", first)
        patch.setattr(noise, "bernoulli", jax.jit(noise.bernoulli, static_argnums=2))
        patch.setattr(noise, "fold_in", jax.jit(noise.fold_in))
        patch.setattr(spherical, "karcher_weights", jax.jit(spherical.karcher_weights))
        yield


def merged(name, knobs, weights, base, experts):
    """Our result, in the type of the experts."""
    stack = stack_leaf(base, experts, weights, KEY)
    own = METHODS[name].prepare(knobs, stack.base.shape)
    part = lift(METHODS[name].make(own))
    return combine(part.apply(stack, "leaf", ())).astype(experts[0].dtype)


def ours(name, knobs, weights, base, experts, dtype):
    cast = functools.partial(jnp.asarray, dtype=dtype)
    base = None if base is None else cast(base)
    found = merged(name, knobs, weights, base, tuple(cast(e) for e in experts))
    assert found.dtype == dtype
    return np.asarray(found, np.float64)


def chances(name, knobs, deltas):
    """What our methods keep an entry with, one for each mask that mergekit draws."""
    for n, delta in enumerate(deltas):
        density = knobs["density"][n]
        if density >= 1 or (density <= 0 and name.startswith("della")):
            continue
        if name.startswith("dare"):
            yield n, jnp.full(delta.shape, density, jnp.float32)
        else:
            epsilon = knobs["epsilon"][n]
            axis = 1 if delta.ndim > 1 else 0
            rising = rank.rising(
                [delta], [density - epsilon], [density + epsilon], axis
            )[0]
            yield n, jnp.asarray(rising, jnp.float32)


def ascending(values, descending=False):
    """Of tied entries the first counts as the largest, as for us."""
    assert not descending
    places = stable_sort(values, descending=True).indices.flip(0)
    return torch.return_types.sort((values[places], places))


def topk(values, k, largest):
    assert largest
    order = stable_sort(values, descending=True)
    return order.values[:k], order.indices[:k]


def theirs(name, knobs, base, experts, dtype):
    """mergekit's result, float64; None where it can have none."""
    tensors = [torch.tensor(np.asarray(leaf), dtype=dtype) for leaf in experts]
    base_index = None
    if METHODS[name].base == "delta" and base is not None:
        base_index, tensors = 0, [torch.tensor(np.asarray(base), dtype=dtype), *tensors]
    elif TABLE[name].base == "required":
        base_index = 0
    first = len(tensors) - len(experts)
    parameters = {
        knob: {first + n: v for n, v in enumerate(value)}
        if knob in TABLE[name].per_source
        else value
        for knob, value in knobs.items()
    }
    if parameters.get("scale") == {0: None}:
        del parameters["scale"]
    patches = [
        mock.patch("torch.argsort", functools.partial(torch.argsort, stable=True)),
        mock.patch("torch.sort", ascending),
        mock.patch("torch.topk", topk),
    ]
    if name in RANDOM:
        deltas = [
            jnp.asarray((t - tensors[0]).to(torch.float64).numpy()) for t in tensors[1:]
        ]
        queue = list(chances(name, knobs, deltas))
        every = [jnp.float32(1)] * len(deltas)
        for n, own in queue:
            every[n] = own
        masks = sparsify.drop(every, lambda delta, mask: mask)(
            stack_leaf(None, deltas, [1.0] * len(deltas), KEY)
        ).deltas

        def bernoulli(p):
            n, own = queue.pop(0)
            gap = np.abs(p.numpy().reshape(own.shape) - np.asarray(own)).max()
            assert gap <= 1e-6, f"probabilities differ by {gap}"
            return torch.tensor(np.asarray(masks[n])).reshape(p.shape).to(p.dtype)

        # it masks float64 in float32 on CPUs: here in the type of the inputs
        wide = {name: getattr(torch, name) for name in dir(torch)}
        wide |= {"bernoulli": bernoulli, "float32": dtype}
        patches.append(
            mock.patch("mergekit.sparsify.torch", types.SimpleNamespace(**wide))
        )
        patches.append(mock.patch("mergekit.sparsify.torch.argsort", patches[0].new))
    for patch in patches:
        patch.start()
    try:
        merged = api.merge_tensors(
            tensors, name, parameters=parameters, base_index=base_index
        )
    finally:
        for patch in patches:
            patch.stop()
    return merged.to(torch.float64).numpy()


def cases(name, with_base, full, shapes=SHAPES):
    """All knobs with all numbers of deltas.

    Numbers in `full` meet all shapes with all knobs; the others meet each shape, but
    take turns with the knobs.
    """
    grid, all_counts = GRID[name], counts(name)
    some = max(2, -(-len(shapes) // len(grid)))  # shapes at a turn
    for count in all_counts:
        turns = count not in full and len(all_counts) > 1
        for g, given in enumerate(grid):
            knobs, weights = resolve(name, given, count)
            for i, shape in enumerate(shapes):
                if turns and (i - some * g - count) % len(shapes) >= some:
                    continue
                if not skip(name, shape):
                    base, experts = draw(shape, count, 100 * g + i)
                    base = base if with_base else None
                    yield knobs, weights, base, experts


def ways():
    """Methods, with and without a base where both can be."""
    for name, method in METHODS.items():
        yield name, method.base == "delta"
        if TABLE[name].base == "optional":
            yield name, False


def skip(name, shape):
    """Where mergekit fails: a row of one entry has no ranks there."""
    return name.startswith("della") and np.prod(shape[1:2] or shape) < 2


def close(found, expected, inputs, bar, label):
    size = functools.reduce(np.maximum, [np.abs(x) for x in inputs])
    gap = np.abs(np.asarray(found, np.float64) - expected)
    worst = (gap / (np.abs(expected) + size)).max()
    assert worst <= bar, f"{label}: {worst}"


both = pytest.mark.parametrize(("name", "with_base"), list(ways()))


@both
def test_float32(name, with_base):
    for knobs, weights, base, experts in cases(
        name, with_base, (counts(name)[0], 3, 5)
    ):
        found = ours(name, knobs, weights, base, experts, jnp.float32)
        expected = theirs(name, knobs, base, experts, torch.float32)
        inputs = experts if base is None else [base, *experts]
        label = name, len(experts), knobs, found.shape
        close(found, expected, inputs, 1e-6, label)


@both
def test_float64(name, with_base):
    with jax.enable_x64(True):
        for knobs, weights, base, experts in cases(name, with_base, (2, 4)):
            found = ours(name, knobs, weights, base, experts, jnp.float64)
            expected = theirs(name, knobs, base, experts, torch.float64)
            inputs = experts if base is None else [base, *experts]
            label = name, len(experts), knobs, found.shape
            close(found, expected, inputs, 1e-12, label)


def rounded(x):
    """The nearest bfloat16, as float64; the unit in its last place."""
    x = np.asarray(torch.tensor(np.asarray(x)).to(torch.bfloat16).to(torch.float64))
    return x, 2.0 ** (np.frexp(np.where(x == 0, 1e-30, x))[1] - 8)


@both
def test_bfloat16(name, with_base):
    """As mergekit in float32 on the same numbers, rounded once.

    That is also what it does itself for linear and slerp; the other methods it computes
    in bfloat16, with errors of several units.
    """
    for knobs, weights, base, experts in cases(name, with_base, (2, 4)):
        base = None if base is None else rounded(base)[0]
        experts = [rounded(expert)[0] for expert in experts]
        found = ours(name, knobs, weights, base, experts, jnp.bfloat16)
        expected = theirs(name, knobs, base, experts, torch.float32)
        inputs = experts if base is None else [base, *experts]
        size = functools.reduce(np.maximum, [np.abs(x) for x in inputs])
        bar = rounded(expected)[1] / 2 + 1e-6 * (np.abs(expected) + size)
        label = name, len(experts), knobs, found.shape
        assert (np.abs(found - expected) <= bar).all(), label
        if name in ("linear", "slerp"):
            expected = theirs(name, knobs, base, experts, torch.bfloat16)
            assert (np.abs(found - expected) <= rounded(expected)[1]).all(), label


@both
def test_compiled(name, with_base):
    """One program for all the numbers that knobs can have."""
    traces = []

    @functools.partial(jax.jit, static_argnames="words")
    def run(base, experts, weights, numbers, words):
        traces.append(words)
        stack = stack_leaf(base, experts, weights, KEY)
        part = lift(METHODS[name].make(dict(words) | numbers))
        return combine(part.apply(stack, "leaf", ()))

    seen = set()
    count = min(2, counts(name)[-1])
    for knobs, weights, base, experts in cases(name, with_base, (), ((64, 48),)):
        if len(experts) != count:
            continue
        own = METHODS[name].prepare(knobs, experts[0].shape)
        words = {k: v for k, v in own.items() if v is None or type(v) in (bool, str)}
        numbers = {k: v for k, v in own.items() if k not in words}
        words = tuple(sorted(words.items()))
        seen.add((words, jax.tree.structure(numbers)))
        cast = functools.partial(jnp.asarray, dtype=jnp.float32)
        leaves = tuple(cast(expert) for expert in experts)
        start = None if base is None else cast(base)
        found = run(start, leaves, tuple(weights), numbers, words)
        expected = theirs(name, knobs, base, experts, torch.float32)
        inputs = experts if base is None else [base, *experts]
        close(found, expected, inputs, 1e-6, (name, knobs))
    assert len(traces) == len(seen)
