"""The sections of a plan: a model merged whole, or layers put together from slices."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from collab_jax.merge.plan import layout
from collab_jax.merge.plan.targets import Group, Model, Target, target


class Section(NamedTuple):
    """A module of the result."""

    targets: tuple[Target, ...]
    # of each layer, the model and the number of the layer that its settings in
    # config.json come from; None: the layers are those of the sources
    layers: tuple[tuple[str, int], ...] | None = None
    notes: tuple[str, ...] = ()


def whole(group: Group) -> Section:
    """All tensors of all sources.

    Args:
      group: the sources.

    Raises:
      ValueError: where the sources differ in their tensors or their shapes.

    >>> from collab_jax.merge.plan.layout import Structure
    >>> from collab_jax.merge.plan.targets import ModelFacts
    >>> model = Model("a", ModelFacts({}, {}), {}, Structure({}, []))
    >>> whole(Group((model,), ("models[0]",), None, "karcher", {}, ({},))).targets
    ()
    """
    first = _first(group)
    like = group.models[first].structure.stacks
    for place, model in zip(group.places, group.models, strict=True):
        own = model.structure.stacks
        for prefix in [*like, *own]:
            ours, theirs = len(own.get(prefix, ())), len(like.get(prefix, ()))
            if ours != theirs:
                raise ValueError(
                    f"{place}: {model.key} has {ours} layers in {prefix}, "
                    f"{group.models[first].key} has {theirs}; choose layers by slices"
                )
    targets = list(_loose(group, layout.before_layers))
    for prefix, layers in like.items():
        for i in range(len(layers)):
            inner = [i] * len(group.models)
            targets += _layer(group, prefix, i, inner, position(i, len(layers)))
    targets += _loose(group, lambda name: not layout.before_layers(name))
    return Section(tuple(targets))


def position(index: int, count: int) -> float:
    """Where a layer lies in its slice, as mergekit says: 1 for the only one.

    >>> position(1, 3), position(0, 1)
    (0.5, 1.0)
    """
    return index / (count - 1) if count > 1 else 1.0


def sliced(
    groups: Sequence[Group],
    ranges: Sequence[Sequence[tuple[int, int]]],
    where: str,
    part: bool = False,
) -> Section:
    """Layers from slices, numbered anew; what is before and after from the outer ones.

    The last slice gives the tensors after the layers, all its sources together. (Where
    the first slice has fewer sources, mergekit 0.1.5 silently drops the others from
    these tensors; that is not repeated here.)

    Args:
      groups: the sources of each slice.
      ranges: for each, the layers [first, end) of each source.
      where: the path of the slices.
      part: whether they are those of a module rather than of a whole model.

    Raises:
      ValueError: where layers are asked for that are not there, or sources differ in
        their tensors.

    >>> from collab_jax.merge.plan.layout import Structure
    >>> from collab_jax.merge.plan.targets import ModelFacts
    >>> model = Model("a", ModelFacts({}, {}), {}, Structure({"h": [[], []]}, []))
    >>> group = Group((model,), ("sources[0]",), None, "passthrough", {}, ({},))
    >>> sliced([group, group], [[(0, 2)], [(1, 2)]], "slices").layers
    (('a', 0), ('a', 1), ('a', 1))
    """
    if part and not any(model.structure.stacks for model in groups[0].models):
        loose = [
            *_loose(groups[0], layout.before_layers),
            *_loose(groups[-1], lambda name: not layout.before_layers(name)),
        ]
        return Section(tuple(loose))  # a module without layers
    stacks = {
        model.key: _main(model, where, part)
        for group in groups
        for model in group.models
    }
    prefix = next(iter(stacks.values()))
    for key, other in stacks.items():
        if other != prefix:
            raise ValueError(
                f"{where}: the layers of {key} are {other}, others are {prefix}; only "
                "models of one architecture can be merged"
            )
    for group, own in zip(groups, ranges, strict=True):
        for place, model, (first, end) in zip(
            group.places, group.models, own, strict=True
        ):
            count = len(model.structure.stacks[prefix])
            if first == end:
                raise ValueError(f"{place}.layer_range: [{first}, {end}] is empty")
            if end > count:
                raise ValueError(
                    f"{place}.layer_range: ends at {end}, {model.key} has {count} "
                    "layers"
                )
    outer = [_flat(group, prefix) for group in (groups[0], groups[-1])]
    targets = list(_loose(outer[0], layout.before_layers))
    layers: list[tuple[str, int]] = []
    for group, own in zip(groups, ranges, strict=True):
        count = own[0][1] - own[0][0]
        for i in range(count):
            inner = [first + i for first, _ in own]
            t = position(i, count)
            targets += _layer(group, prefix, len(layers), inner, t)
            layers.append((group.models[_first(group)].key, inner[_first(group)]))
    targets += _loose(outer[1], lambda name: not layout.before_layers(name))
    notes = []
    if len(groups[-1].models) > len(groups[0].models):
        notes.append(
            f"{where}: the tensors after the layers use all "
            f"{len(groups[-1].models)} sources of the last slice; mergekit 0.1.5 uses "
            f"the first {len(groups[0].models)} only"
        )
    return Section(tuple(targets), tuple(layers), tuple(notes))


def _main(model: Model, where: str, part: bool) -> str:
    """The prefix of the layers that slices are about."""
    stacks = model.structure.stacks
    config = model.facts.config
    if len(stacks) == 1:
        return next(iter(stacks))
    if not stacks:
        raise ValueError(f"{where}: {model.key} has no layers that could be sliced")
    if part:
        return max(stacks, key=lambda p: sum(map(len, stacks[p])))
    count = next((config[key] for key in COUNTS if key in config), None)
    fitting = [prefix for prefix, layers in stacks.items() if len(layers) == count]
    several = config.get("is_encoder_decoder") or any(
        isinstance(value, dict) for key, value in config.items() if "vision" in key
    )
    if len(fitting) != 1 or several:
        raise ValueError(
            f"{where}: {model.key} has several stacks of layers "
            f"({', '.join(stacks)}); use modules to slice one of them"
        )
    return fitting[0]


COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _flat(group: Group, prefix: str) -> Group:
    """The group with all stacks but one among its loose tensors."""

    def flat(model: Model) -> Model:
        others = [
            f"{stack}.{i}.{rest}"
            for stack, layers in model.structure.stacks.items()
            for i, rests in enumerate(layers)
            for rest in rests
            if stack != prefix
        ]
        loose = [*model.structure.loose, *others]
        return model._replace(structure=model.structure._replace(loose=loose))

    return group._replace(models=tuple(flat(model) for model in group.models))


def _first(group: Group) -> int:
    return 0 if group.base is None else group.base


def _loose(group: Group, keep: Callable[[str], bool]) -> Iterator[Target]:
    """The targets outside of the layers, read at t = 0 wherever they stand.

    A head that only some sources have is made for the result; the others lend their
    embeddings, to which theirs is tied.
    """
    like = group.models[_first(group)]
    names = dict.fromkeys(filter(keep, like.structure.loose))
    for i, model in enumerate(group.models):
        for name in filter(keep, model.structure.loose):
            if name in names:
                continue
            if layout.tied_to(name, like.names) is not None:
                names[name] = None
            elif not layout.is_buffer(name, model.facts.layouts[model.names[name]]):
                raise _extra(group, i, name)
    for name in names:
        made = target(group, name, [name] * len(group.models), 0)
        if made is not None:
            yield made


def _layer(
    group: Group, stack: str, outer: int, inner: Sequence[int], t: float
) -> Iterator[Target]:
    """The targets of one layer: its number in the result and in each source."""
    first = _first(group)
    rests = [
        model.structure.stacks[stack][i]
        for model, i in zip(group.models, inner, strict=True)
    ]
    known = set(rests[first])
    for i, own in enumerate(rests):
        for rest in own if i != first else ():
            name = f"{stack}.{inner[i]}.{rest}"
            if rest not in known and not layout.is_buffer(
                name, group.models[i].facts.layouts[group.models[i].names[name]]
            ):
                raise _extra(group, i, name)
    for rest in rests[first]:
        inputs = [f"{stack}.{i}.{rest}" for i in inner]
        made = target(group, f"{stack}.{outer}.{rest}", inputs, t)
        if made is not None:
            yield made


def _extra(group: Group, index: int, name: str) -> ValueError:
    like = group.models[_first(group)]
    return ValueError(
        f"{group.places[index]}: {group.models[index].key} has the tensor {name}, "
        f"which {like.key} lacks; only models of one architecture can be merged"
    )
