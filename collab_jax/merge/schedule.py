"""Numbers that follow from a leaf's name: its layer, or the first pattern that fits.

Use: `scheduled(lambda k: scale(k["by"]), knobs(by=linear_by_layer(0.2, 1.0, 12)))`
scales the merged task vector of layer l by 0.2 + l / 11.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# "model.layers.3.", "layers_3/", "transformer.h.3.", "encoder.layer.3.",
# "decoder.block.3.", "resblocks.3."; the first such word counts: an expert or a
# sub-layer with a number of its own stands further to the right.
_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|(?:res)?blocks?)[._/](\d+)(?=[./]|$)")

Numbers = Callable[[str], Any]  # name of a leaf -> a number or tracer


def layer_of(name: str) -> int | None:
    """The index of the layer a leaf belongs to; None for a leaf outside of the layers.

    Args:
      name: in a checkpoint, or the path in a Flax tree.

    >>> layer_of("model.layers.12.mlp.experts.3.w1.weight"), layer_of("layers_12/q")
    (12, 12)
    >>> layer_of("transformer.h.0.ln_1.weight"), layer_of("model.embed_tokens.weight")
    (0, None)
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def count_layers(names: Iterable[str]) -> int:
    """How many layers a model has: one more than the highest index.

    Args:
      names: of all leaves, as `collab_jax.tree.paths(params)` or a checkpoint has them.

    Raises:
      ValueError: where no name belongs to a layer.

    >>> count_layers(["embed/table", "layers_0/q/kernel", "layers_1/q/kernel"])
    2
    """
    names = list(names)
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    if not layers:
        raise ValueError(
            f"no layer was found in {len(names)} names, the first is "
            f"{names[0] if names else 'missing'!r}: names such as 'model.layers.0.x' "
            "or 'layers_0/x' are expected"
        )
    return max(layers) + 1


def linear_by_layer(a, b, layers: int, outside=None) -> Numbers:
    """A number that rises along a straight line from the first layer to the last.

    `a + b * l / (L - 1)` for layer l of L; a where L = 1.

    Args:
      a: at the first layer; a number or tracer.
      b: what the last layer has more than the first.
      layers: L, see `count_layers`.
      outside: for leaves outside of the layers; None is a.

    Raises:
      ValueError: for fewer than 1 layer; and, when asked, for a layer beyond the last.

    >>> ramp = linear_by_layer(0.5, 1.0, layers=3)
    >>> [ramp(name) for name in ("embed", "layers_0/q", "layers_1/q", "layers_2/q")]
    [0.5, 0.5, 1.0, 1.5]
    """
    if layers < 1:
        raise ValueError(f"layers = {layers} was given, 1 or more is expected")

    def number(name: str):
        layer = layer_of(name)
        if layer is None:
            return a if outside is None else outside
        if layer >= layers:
            raise ValueError(f"{name} is in layer {layer}, of {layers} layers")
        return a + b * (layer / max(1, layers - 1))

    return number


def by_name(numbers: Mapping[str, Any], default=None) -> Numbers:
    """The number of the first expression that is found in a name.

    Args:
      numbers: regular expression for `re.search` -> number or tracer, in order.
      default: where none is found; None makes that an error.

    Raises:
      ValueError: when asked, for a name that no expression is found in.

    >>> dense = by_name({r"self_attn|attention": 0.9, r"mlp": 0.5}, default=1.0)
    >>> dense("model.layers.0.mlp.up_proj.weight"), dense("model.norm.weight")
    (0.5, 1.0)
    """
    patterns = [(re.compile(pattern), number) for pattern, number in numbers.items()]

    def number(name: str):
        for pattern, value in patterns:
            if pattern.search(name):
                return value
        if default is None:
            raise ValueError(
                f"none of the expressions {list(numbers)} is found in {name}: add one, "
                "or a default"
            )
        return default

    return number


def knobs(**numbers: Numbers) -> Callable[[str, tuple[int, ...]], dict[str, Any]]:
    """What `scheduled` takes: several numbers of a leaf's name together.

    Args:
      **numbers: name of the knob -> its numbers.

    >>> knobs(by=linear_by_layer(1.0, 1.0, 2))("layers_1/q", (3,))
    {'by': 2.0}
    """
    return lambda name, shape: {key: number(name) for key, number in numbers.items()}
