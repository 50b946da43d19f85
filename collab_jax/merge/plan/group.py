"""Models that are merged together, and whether the method takes them."""

from collections.abc import Sequence
from typing import NamedTuple

from collab_jax.merge.mergekit_table import Spec
from collab_jax.merge.plan.parameters import Setting
from collab_jax.merge.plan.reference import Reference, show


class Source(NamedTuple):
    """A model, or some of its layers."""

    model: Reference
    layers: tuple[int, int] | None  # [first, end); None: all
    parameters: dict[str, Setting]
    where: str  # its path in the document


class Slice(NamedTuple):
    """Layers of the result, from as many layers of each source."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: dict[str, Setting]
    where: str


class Module(NamedTuple):
    """A part of the model: merged whole, or made of slices."""

    slices: tuple[Slice, ...] | None
    models: tuple[Source, ...] | None
    parameters: dict[str, Setting]
    where: str


def check(
    method: str,
    spec: Spec,
    sources: Sequence[Source],
    base: Reference | None,
    where: str,
) -> None:
    """Checks one group of sources, the base among them, against what a method takes.

    Args:
      method: its name, for messages.
      spec: what it takes.
      sources: in the order of the document.
      base: the base model of this group.
      where: the path of the group.

    Raises:
      ValueError: for a model that stands twice; for a base that is missing or not among
        the sources; for too few or too many sources, or layers.

    >>> from collab_jax.merge.mergekit_table import TABLE
    >>> from collab_jax.merge.plan.reference import parse
    >>> a, b = (Source(parse(x), None, {}, f"models[{i}]") for i, x in enumerate("ab"))
    >>> check("ties", TABLE["ties"], [a, b], a.model, "models")
    >>> check("ties", TABLE["ties"], [a, b], None, "models")
    Traceback (most recent call last):
    ValueError: base_model: is required by ties and missing
    >>> check("passthrough", TABLE["passthrough"], [a, b], None, "models")
    Traceback (most recent call last):
    ValueError: models: passthrough takes exactly 1 source; found 2
    """
    first: dict[Reference, str] = {}
    for source in sources:
        if source.model in first:
            raise ValueError(
                f"{source.where}: {show(source.model)} stands already at "
                f"{first[source.model]}; name each model once"
            )
        first[source.model] = source.where
    apart = spec.base != "source" and base is not None
    if spec.base == "required" and base is None:
        raise ValueError(f"base_model: is required by {method} and missing")
    if spec.base != "source" and base is not None and base not in first:
        raise ValueError(
            f"{where}.sources: the base model {show(base)} is not among them; "
            f"{method} needs its layers, add it as a source"
        )
    count = len(sources) - apart
    if count < max(spec.least, 1 - apart) or (
        spec.most is not None and count > spec.most
    ):
        raise ValueError(
            f"{where}: {method} takes {_range(spec, apart)}; found {count}"
        )
    lengths = {s.where: s.layers[1] - s.layers[0] for s in sources if s.layers}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{place}: {length}" for place, length in lengths.items())
        raise ValueError(f"{where}: sources need as many layers each; found {listed}")


def _range(spec: Spec, apart: bool) -> str:
    what = "source" + (" beside the base" if apart else "")
    plural = what.replace("source", "sources")
    if spec.least == spec.most:
        return f"exactly {spec.least} {what if spec.least == 1 else plural}"
    few = "one " + what if spec.least < 2 else f"{spec.least} {plural}"
    return f"at least {few}"
