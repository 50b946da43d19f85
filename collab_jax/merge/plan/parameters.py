"""Values of merge parameters: scalars, gradients over layers, filters by tensor name.

A setting is a tuple of rules. The first whose filter is part of the tensor's name gives
the value; where no rule matches, the next level of the document is asked: source, then
slice, then module, then the whole document, then the method's default.

Three things are as in mergekit 0.1.5, and easily surprise:
- the tensors before *and after* the layers read gradients at t = 0, the first value;
- a slice of a single layer reads them at t = 1, the last value;
- per-source values match filters against the name in the source, shared values against
  the name in the result: they differ where layers are moved.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from collab_jax.merge.mergekit_table import REQUIRED, Parameter
from collab_jax.merge.plan import fields

_READ: dict[str, Callable[[Any, str], Any]] = {
    "float": fields.number,
    "int": fields.whole,
    "bool": fields.flag,
}


class Rule(NamedTuple):
    """Values for the tensors whose name contains the filter."""

    filter: str | None  # None: for all
    values: tuple[Any, ...]  # one, or a gradient over the layers


class Setting(NamedTuple):
    """What one place of a document says about one parameter."""

    parameter: Parameter
    rules: tuple[Rule, ...]
    where: str  # its path in the document


def setting(value: Any, parameter: Parameter, where: str) -> Setting:
    """Reads the value of a parameter.

    Args:
      value: a scalar; a list of scalars; a mapping `{filter, value}` or a list of them,
        whose values are scalars or lists of scalars.
      parameter: its kind decides how scalars are read.
      where: its path in the document.

    Raises:
      ValueError: for anything else. mergekit takes an empty list as no value; here it
        is an error.

    >>> weight = Parameter("float")
    >>> setting([0, 1], weight, "parameters.weight").rules
    (Rule(filter=None, values=(0.0, 1.0)),)
    >>> setting([{"filter": "mlp", "value": "1e-1"}], weight, "parameters.weight").rules
    (Rule(filter='mlp', values=(0.1,)),)
    >>> setting([{"value": "x"}], weight, "parameters.weight")
    Traceback (most recent call last):
    ValueError: parameters.weight[0].value: found the text 'x'; a number was expected
    """
    read = _READ[parameter.kind]

    def values(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return (read(value, where),)
        if not value:
            raise ValueError(f"{where}: is empty; a value was expected")
        listed = fields.entries(value, where, "values")
        return tuple(read(entry, place) for place, entry in listed)

    def rule(value: Any, where: str) -> Rule:
        given = fields.mapping(value, where, ("filter", "value"), ["value"])
        pattern = given.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            raise ValueError(f"{where}.filter: {pattern!r} is not text")
        found = values(given["value"], f"{where}.value")
        return Rule(None if pattern == "*" else pattern, found)

    if isinstance(value, dict):
        return Setting(parameter, (rule(value, where),), where)
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        listed = fields.entries(value, where, "{filter, value}")
        return Setting(parameter, tuple(rule(v, p) for p, v in listed), where)
    return Setting(parameter, (Rule(None, values(value, where)),), where)


def evaluate(setting: Setting, name: str, t: float) -> Any:
    """The value for one tensor, or None where no filter matches.

    Numbers are interpolated between the two neighbours of t * (n - 1); of a list of
    bools the one at int(t * (n - 1)) is taken.

    Args:
      setting: as read.
      name: of the tensor.
      t: where its layer lies, from 0 for the first to 1 for the last of a slice.

    Raises:
      ValueError: where a whole number is asked for and the gradient gives none.

    >>> ramp = setting([0, 1, 4], Parameter("float"), "parameters.t")
    >>> [evaluate(ramp, "layers.0.mlp", t) for t in (0, 0.25, 0.75, 1)]
    [0.0, 0.5, 2.5, 4.0]
    """
    for rule in setting.rules:
        if rule.filter is None or rule.filter in name:
            return _blend(setting, rule.values, t)
    return None


def _blend(setting: Setting, values: tuple[Any, ...], t: float) -> Any:
    if len(values) == 1:
        return values[0]
    position = t * (len(values) - 1)
    low = int(position)
    if setting.parameter.kind == "bool":
        return values[low]
    high, share = min(len(values) - 1, low + 1), position - low
    value = (1 - share) * values[low] + share * values[high]
    if setting.parameter.kind == "int":
        if not float(value).is_integer():
            raise ValueError(
                f"{setting.where}: the gradient gives {value:g} for a layer; a whole "
                "number was expected"
            )
        return int(value)
    return value


Levels = Sequence[dict[str, Setting]]  # from the closest to the tensor to the document


def resolve(
    name: str, parameter: Parameter, levels: Levels, where: str = "parameters"
) -> Callable[[str, float], Any]:
    """How one parameter's value follows from a tensor's name and place.

    Args:
      name: of the parameter.
      parameter: what the method says of it.
      levels: the settings of each level, the closest first.
      where: the path of the closest level's parameters, for messages.

    Returns:
      (tensor's name, t) -> value. It raises a ValueError where a parameter without
      default has no value there.

    >>> weight = Parameter("float")
    >>> near = {"weight": setting({"filter": "mlp", "value": 1}, weight, "source")}
    >>> far = {"weight": setting(0.5, weight, "document")}
    >>> at = resolve("weight", weight, [near, far])
    >>> at("layers.0.mlp", 0), at("layers.0.attn", 0)
    (1.0, 0.5)
    """
    settings = [level[name] for level in levels if name in level]

    def value(tensor: str, t: float) -> Any:
        for setting in settings:
            found = evaluate(setting, tensor, t)
            if found is not None:
                return found
        if parameter.default is not REQUIRED:
            return parameter.default
        if settings:
            paths = ", ".join(setting.where for setting in settings)
            raise ValueError(
                f"{paths}: no filter matches the tensor {tensor}, and {name} has no "
                "default; add a last entry with only a value"
            )
        raise ValueError(f"{where}.{name}: is required and missing (for {tensor})")

    return value
