"""What mergekit 0.1.5 knows and accepts: methods, references, keys, tensors' names."""

import json
import warnings

import pytest

from collab_jax.merge.mergekit_table import REQUIRED, TABLE
from collab_jax.merge.plan.config import read
from collab_jax.merge.plan.layout import before_layers, tied_to, vocabulary_axis
from collab_jax.merge.plan.reference import parse, show

pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import yaml
    from mergekit import merge_methods
    from mergekit.architecture.json_definitions import JSON_ARCHITECTURES
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration


def test_the_table_is_mergekits():
    """Methods, parameters, defaults, types, and what they take."""
    registered = {m.spec.name: m.spec for m in merge_methods.registered_methods()}
    assert set(TABLE) == set(registered)
    kinds = {float: "float", int: "int", bool: "bool"}
    for name, spec in registered.items():
        own, contract = TABLE[name], spec.contract
        for group, theirs in (
            (own.shared, spec.shared_parameters),
            (own.per_source, spec.input_parameters),
        ):
            assert {p.name for p in theirs} == set(group), name
            for p in theirs:
                kind = kinds.get(p.value_type, "float")  # Optional[float]
                assert group[p.name].kind == kind
                default = REQUIRED if p.required else p.default
                assert group[p.name].default == default
        base = {"ignored": "source"}.get(contract.base.value, contract.base.value)
        assert own.base == base, name
        counts = range(6)
        for count in counts:
            for has_base in (True, False):
                ids = list(range(count + (has_base and base != "source")))
                first = 0 if has_base and base != "source" else None
                taken = own.least <= count <= (own.most or count)
                taken &= has_base or base != "required"
                taken &= bool(ids)
                assert _takes(contract, ids, first) == taken, (name, count, has_base)


def _takes(contract, ids, base):
    try:
        contract.validate_ids(ids, base)
    except ValueError:
        return False
    return True


REFERENCES = ["a", "org/a@v1", "a+b", "a@x+b@y"]
REFERENCES += [
    {"model": "a@b"},
    {"model": {"path": "a", "revision": "r"}, "lora": "l@s"},
]


@pytest.mark.parametrize("value", REFERENCES, ids=str)
def test_references_are_mergekits(value):
    expected = ModelReference.model_validate(value)
    made = parse(value)
    assert show(made) == str(expected)
    assert tuple(made.model) == (expected.model.path, expected.model.revision)


@pytest.mark.parametrize("value", ["a+b+c", "a@b@c", 3, {"lora": "a"}], ids=str)
def test_references_mergekit_refuses(value):
    with pytest.raises((ValueError, RuntimeError)):
        ModelReference.model_validate(value)
    with pytest.raises(ValueError, match=r"^here"):
        parse(value, "here")


# Merely a name's place among modules that have no layers, a norm that mergekit places
# before the layers though it ends them, and a prefix without its dot.
OTHERWISE = ("projector", "visual.merger", "embedding_norm", "decoderembed_tokens")


def test_names_tell_what_mergekits_tables_say():
    """Before or after the layers, rows of tokens, ties: for all its architectures."""
    checked = 0
    for info in JSON_ARCHITECTURES:
        for module in info.modules.values():
            prefix = module.weight_prefix or ""
            inner = module.architecture.definition
            for early, weights in (
                (True, inner.pre_weights),
                (False, inner.post_weights),
            ):
                for weight in weights:
                    name = prefix + weight.name
                    if "$" in name or any(other in name for other in OTHERWISE):
                        continue
                    shape = (9,) if name.endswith("bias") else (9, 4)
                    axis = vocabulary_axis(name, shape, {"vocab_size": 9})
                    assert before_layers(name) == early, name
                    assert axis == weight.vocabulary_axis, name
                    for other in (weight.tied_names or ())[:1]:
                        assert tied_to(name, [prefix + other]) == prefix + other
                    checked += 1
    assert checked > 150


LINEAR = {"merge_method": "linear", "models": [{"model": "a"}]}
SLICED = {"model": "a", "layer_range": [0, 2]}


def parameter(value):
    return LINEAR | {"parameters": {"weight": value}}


def ranged(value):
    sources = [SLICED | {"layer_range": value}]
    return {"merge_method": "linear", "slices": [{"sources": sources}]}


def tokens(**value):
    return LINEAR | {"tokenizer": value}


BOTH_TAKE = [
    *map(parameter, [1, "1", "1e-5", True, [1, 2], [True, 1], {"value": [0, 1]}]),
    *map(parameter, [[{"value": 1, "filter": "x"}], {"value": 1, "filter": None}]),
    *map(ranged, [[0, 2], ["0", "2"], [0, 2.0], (1, 2), [0, 0]]),
    *(LINEAR | {"tokenizer_source": x} for x in ("union", "base", "x@r", None)),
    *(LINEAR | {"base_model": {"model": x}} for x in ("x", {"path": "x"})),
    *(tokens(**x) for x in ({}, {"source": "x"}, {"pad_to_multiple_of": "8"})),
    tokens(tokens={"x": {}, "y": {"source": {"kind": "zero"}, "force": "yes"}}),
    tokens(
        tokens={"x": {"source": {"kind": "model_token", "model": "m", "token": ""}}}
    ),
    LINEAR | {"parameters": None, "slices": [], "modules": {}, "dtype": ""},
]
BOTH_REFUSE = [
    *map(parameter, [None, [[1]], [{"value": 1}, 2], {"filter": "x"}, {"value": None}]),
    *map(parameter, [{"value": 1, "filter": 3}, {"value": {"value": 1}}]),
    *map(ranged, [[0], [0, 1, 2], "0,2", None, [0, 2.5]]),
    *(LINEAR | {"base_model": x} for x in (3, "a@b@c", "a+b+c", {"path": "x"})),
    tokens(tokens={"x": None}),
    tokens(tokens={1: {"source": "m"}}),
    LINEAR | {"tokenizer_source": "base", "tokenizer": {"source": "base"}},
    LINEAR | {"models": None},
    LINEAR | {"slices": [{"sources": [SLICED]}]},
    LINEAR | {"models": ["a"]},
    LINEAR | {"models": [{}]},
    {"models": [{"model": "a"}]},
]
ONLY_WE_REFUSE = [  # nothing comes of these: ignored there, or failing in the midst
    parameter([]),
    parameter([1, "a"]),
    tokens(tokens={"x": {"source": {"kind": "model_token", "model": "m"}}}),
    ranged([2, 0]),
    ranged([-1, 2]),
    LINEAR | {"dtype": "float99"},
    LINEAR | {"modles": []},
    LINEAR | {"merge_method": "linaer"},
    LINEAR | {"models": [{"model": "a", "weight": 1}]},
    LINEAR | {"models": [{"model": "a"}, {"model": "a"}]},
]


def accepts(merge):
    try:
        MergeConfiguration.model_validate(merge)
    except (ValueError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("merge", BOTH_TAKE, ids=str)
def test_what_mergekit_takes(merge):
    assert accepts(merge)
    assert len(read(json.dumps(merge))) == 1


@pytest.mark.parametrize("merge", BOTH_REFUSE, ids=str)
def test_what_mergekit_refuses(merge):
    assert not accepts(merge)
    with pytest.raises(ValueError, match=r"\w"):
        read(yaml.safe_dump(merge))


@pytest.mark.parametrize("merge", ONLY_WE_REFUSE, ids=str)
def test_what_mergekit_does_not_notice(merge):
    assert accepts(merge)
    with pytest.raises(ValueError, match=r"\w"):
        read(yaml.safe_dump(merge))
