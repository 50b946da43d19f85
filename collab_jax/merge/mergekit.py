"""mergekit's 20 methods by name, for its configurations: close to 0.1.5 bit by bit.

`METHODS[name]` says how the stack is made, works out whole numbers from the knobs of a
leaf on the host, and makes the part that merges it. Knobs have mergekit's names, except
that `weight` comes as the weights of the stack, so that gradients reach it.

Differences, each stated where it is made: leaves are computed in float32 at least, and
in float64 throughout if they are that, where mergekit works in the input type; nothing
but the type of the base comes out; what mergekit draws or leaves to an unstable sort is
decided by position.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from collab_jax.merge import mergekit_tasks as tasks
from collab_jax.merge import mergekit_vectors as vectors
from collab_jax.merge import sparsify
from collab_jax.merge.mergekit_table import REQUIRED, TABLE
from collab_jax.merge.stack import Part, Shape, Transform, scheduled

Knobs = dict[str, Any]  # per source: tuples of N numbers; shared: numbers, flags


class Method(NamedTuple):
    """One method."""

    # what `prepare` returned, its numbers perhaps tracers -> the part
    make: Callable[[Knobs], Part]
    # (knobs of a leaf, its shape) -> what `make` needs; on the host, may raise
    # ValueError
    prepare: Callable[[Knobs, Shape], Knobs]
    # "none": the stack has no base, deltas are the models, the base model the first of
    # them or where the configuration has it; "delta": deltas are model minus base, and
    # the models where the method was given no base
    base: Literal["none", "delta"]


def part(name: str, count: int, knobs: Knobs | None = None) -> Transform:
    """A method for merging in memory; `weight` is given to `merge` as weights.

    Args:
      name: mergekit's name of the method.
      count: N, the deltas; see `Method.base`.
      knobs: what differs from the defaults; a number for all experts, or N of them.

    Raises:
      ValueError: for a name or a knob that mergekit does not have, for one that is
        missing, and for a number that the method cannot work with.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros(2)}, {"a": jnp.array([1.0, 3.0])}
    >>> merge(part("ties", 1, {"density": 0.5}), base, [expert])["a"].tolist()
    [0.0, 3.0]
    """
    if name not in METHODS:
        raise ValueError(f"{name!r} is no method: one of {', '.join(METHODS)} is")
    spec, given = TABLE[name], dict(knobs or {})
    known = spec.per_source | spec.shared
    if unknown := given.keys() - known.keys():
        raise ValueError(f"{name} has no knob {min(unknown)!r}: {', '.join(known)}")
    resolved: Knobs = {}
    for knob, parameter in known.items():
        value = given.get(knob, parameter.default)
        if value is REQUIRED and knob != "weight":
            raise ValueError(f"{name} needs {knob!r}")
        each = knob in spec.per_source and not isinstance(value, tuple | list)
        resolved[knob] = (value,) * count if each else value
    resolved.pop("weight", None)
    method = METHODS[name]
    return scheduled(
        method.make,
        lambda leaf, shape: method.prepare(resolved, shape),
        hosted=name in HOSTED,
    )


# select or rank entries of a leaf
HOSTED = "ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce"


def _size(shape: Shape) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _same(knobs: Knobs, shape: Shape) -> Knobs:
    return knobs


def _known(*values: Any) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def _check_sum(flag: str, least: int) -> Callable[[Knobs, Shape], Knobs]:
    """Where `least` weights or more are divided by their sum, it must not be zero."""

    def prepare(knobs: Knobs, shape: Shape) -> Knobs:
        weights = knobs.get("weight") or ()
        divided = knobs[flag] and len(weights) >= least and _known(*weights)
        if divided and sum(weights) == 0:
            raise ValueError(
                f"the weights {list(weights)} sum to 0 and {flag} divides by that: "
                f"other weights are expected, or {flag}: false"
            )
        return {knob: value for knob, value in knobs.items() if knob != "weight"}

    return prepare


def _arithmetic(
    elect: bool,
    sparse: Callable[[Knobs], Part] | None = None,
    counts: Callable[[Knobs, int], Knobs] = lambda knobs, size: {},
) -> Method:
    """The family of task arithmetic; `counts` prepares what `sparse` needs."""

    def prepare(knobs: Knobs, shape: Shape) -> Knobs:
        shared = {k: knobs[k] for k in ("normalize", "rescale", "lambda")}
        # a density of 1 leaves the deltas as they are: no program for that
        thin = sparse is not None and not (
            _known(*knobs["density"]) and all(d >= 1 for d in knobs["density"])
        )
        return {"thin": thin, **shared, **(counts(knobs, _size(shape)) if thin else {})}

    def make(knobs: Knobs) -> Part:
        thin = sparse(knobs) if sparse is not None and knobs["thin"] else None
        if thin is not None and knobs["rescale"]:
            thin = tasks.same_size(thin)
        return tasks.arithmetic(thin, elect, knobs["normalize"], knobs["lambda"])

    return Method(make, prepare, "delta")


def _keep_counts(knobs: Knobs, size: int) -> Knobs:
    """The largest `max(1, int(density * M))` stay, all at 1 and none at 0."""

    def count(density):
        if not _known(density):
            return sparsify.kept(density, size)
        return min(sparsify.kept(density, size), size) if density > 0 else 0

    return {"keep": tuple(count(density) for density in knobs["density"])}


def _band_counts(knobs: Knobs, size: int) -> Knobs:
    """Without `int(gamma * M)` outliers, `int(density * M)` stay, of the largest.

    Where too few are left, fewer outliers go; at a density of 1 none does.
    """
    outer, inner = [], []
    for density, gamma in zip(knobs["density"], knobs["gamma"], strict=True):
        if not _known(density, gamma):
            raise ValueError("density and gamma of breadcrumbs cannot be traced")
        kept = size if density >= 1 else int(density * size)
        outliers = min(int(gamma * size), size - kept)
        outer.append(kept + outliers)
        inner.append(outliers)
    return {"outer": tuple(outer), "inner": tuple(inner)}


def _rank_chances(knobs: Knobs, size: int) -> Knobs:
    """From `density - epsilon` to `density + epsilon`; always at 1 and never at 0."""
    lows, highs = [], []
    for density, epsilon in zip(knobs["density"], knobs["epsilon"], strict=True):
        if _known(density, epsilon):
            if density >= 1 or density <= 0:
                density, epsilon = min(max(density, 0.0), 1.0), 0.0
            elif density + epsilon >= 1 or density - epsilon <= 0:
                raise ValueError(
                    f"density {density} and epsilon {epsilon} were given: density - "
                    "epsilon and density + epsilon are expected inside (0, 1)"
                )
        lows.append(density - epsilon)
        highs.append(density + epsilon)
    return {"low": tuple(lows), "high": tuple(highs)}


def _chances(knobs: Knobs, size: int) -> Knobs:
    return {"chance": tuple(knobs["density"])}


def _trim(knobs: Knobs) -> Part:
    return sparsify.keep_largest(knobs["keep"], ties="first")


def _drop(knobs: Knobs) -> Part:
    return tasks.drop_by_chance(knobs["chance"])


def _crumbs(knobs: Knobs) -> Part:
    return tasks.keep_band(knobs["outer"], knobs["inner"])


def _ranked(knobs: Knobs) -> Part:
    return tasks.drop_by_rank(knobs["low"], knobs["high"])


def _select(knobs: Knobs, shape: Shape) -> Knobs:
    share = knobs["select_topk"]
    select = not (_known(share) and share >= 1)
    return {"select": select, "select_topk": share, "size": float(_size(shape))}


METHODS: dict[str, Method] = {
    "linear": Method(
        lambda k: vectors.linear(k["normalize"]), _check_sum("normalize", 1), "none"
    ),
    "slerp": Method(lambda k: vectors.slerp(k["t"]), _same, "none"),
    "nuslerp": Method(
        lambda k: vectors.nuslerp(k["nuslerp_row_wise"], k["nuslerp_flatten"]),
        _same,
        "delta",
    ),
    "multislerp": Method(
        lambda k: vectors.multislerp(k["normalize_weights"], k["eps"]),
        _check_sum("normalize_weights", 2),
        "delta",
    ),
    "karcher": Method(
        lambda k: vectors.karcher(k["max_iter"], k["tol"]), _same, "none"
    ),
    "task_arithmetic": _arithmetic(elect=False),
    "ties": _arithmetic(True, _trim, _keep_counts),
    "dare_ties": _arithmetic(True, _drop, _chances),
    "dare_linear": _arithmetic(False, _drop, _chances),
    "breadcrumbs": _arithmetic(False, _crumbs, _band_counts),
    "breadcrumbs_ties": _arithmetic(True, _crumbs, _band_counts),
    "della": _arithmetic(True, _ranked, _rank_chances),
    "della_linear": _arithmetic(False, _ranked, _rank_chances),
    "sce": Method(
        lambda k: tasks.sce(k["select"], k["select_topk"], k["size"]), _select, "delta"
    ),
    "ram": Method(lambda k: tasks.ram(k["epsilon"]), _same, "delta"),
    "ramplus_tl": Method(
        lambda k: tasks.ramplus_tl(k["r"], k["alpha"], k["epsilon"]), _same, "delta"
    ),
    "model_stock": Method(
        lambda k: vectors.model_stock(k["filter_wise"]), _same, "delta"
    ),
    "nearswap": Method(lambda k: vectors.nearswap(k["t"]), _same, "none"),
    "arcee_fusion": Method(lambda k: tasks.arcee_fusion(), _same, "none"),
    "passthrough": Method(lambda k: vectors.passthrough(k["scale"][0]), _same, "none"),
}
