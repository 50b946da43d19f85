"""Reading merge configurations: what is accepted, and what each mistake is told."""

import copy
import random
import textwrap

import pytest
import yaml

from collab_jax.merge.mergekit_table import TABLE
from collab_jax.merge.plan.config import read, references
from collab_jax.merge.plan.parameters import evaluate
from collab_jax.merge.plan.reference import parse

FULL = """
merge_method: ties
base_model: {model: {path: base, revision: main}}
slices:
- sources:
  - model: base@main
    layer_range: [0, 8]
  - model: {model: {path: a, revision: r}, lora: {path: l}, override_architecture: X}
    layer_range: ["0", 8.0]
    parameters:
      weight: [0, 0.5]
      density: [{filter: mlp, value: 0.5}, {value: [0.1, 0.9]}]
  base_model: base@main
  residual_weight: 0.5
  parameters: {normalize: true}
parameters: {int8_mask: 1, lambda: "1e-1"}
dtype: float32
out_dtype: torch.bfloat16
tokenizer:
  source: union
  tokens:
    <a>: {source: a}
    <b>: {source: {kind: zero}}
    <c>: {source: {kind: model_token, model: base, token: x}, force: true}
    <d>: {source: {kind: model_token, model: base, token_id: 3}}
  pad_to_multiple_of: 8
chat_template: chatml
"""
MODELS = """
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 2}}
"""


def error(text):
    """What is said about a text."""
    with pytest.raises(ValueError, match=r": |was|is") as caught:
        read(textwrap.dedent(text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_is_read():
    [merge] = read(FULL)
    [piece] = merge.modules[""].slices
    assert merge.base == piece.base == parse("base@main")
    assert piece.sources[1].model.architecture == "X"
    assert piece.sources[1].layers == (0, 8)
    assert evaluate(piece.sources[1].parameters["weight"], "n", 0.5) == 0.25
    assert evaluate(piece.sources[1].parameters["density"], "x.mlp", 0) == 0.5
    assert evaluate(piece.sources[1].parameters["density"], "x", 1) == 0.9
    assert evaluate(merge.parameters["lambda"], "n", 0) == 0.1
    assert evaluate(merge.parameters["int8_mask"], "n", 0) is True
    assert (merge.dtype, merge.out_dtype) == ("float32", "bfloat16")
    assert merge.tokenizer.tokens["<b>"].zero
    assert merge.tokenizer.tokens["<c>"].source.token == "x"
    assert merge.tokenizer.tokens["<d>"].source.token_id == 3
    assert merge.tokenizer.pad_to_multiple_of == 8
    assert merge.notes == ("residual_weight has no effect, as in mergekit",)


def keys(value, path=()):
    """The places of all keys of a document; tokens are no keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path[-1:] != ("tokens",):
                yield (*path, key)
            yield from keys(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from keys(inner, (*path, i))


def written(path):
    """A path as messages have it."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


WHOLE = yaml.safe_load(FULL)


@pytest.mark.parametrize("path", list(keys(WHOLE)), ids=written)
@pytest.mark.parametrize("seed", range(3))
def test_any_misspelt_key_is_an_error_with_its_path(path, seed):
    draw = random.Random(seed)
    value = copy.deepcopy(WHOLE)
    place = value
    for part in path[:-1]:
        place = place[part]
    old, at = path[-1], draw.randrange(len(path[-1]))
    new = [old[:at] + old[at + 1 :], old[:at] + "x" + old[at:], old + "s"][seed]
    place[new or "x"] = place.pop(old)
    with pytest.raises(ValueError, match="unknown") as caught:
        read(yaml.safe_dump(value))
    message = str(caught.value)
    assert message.startswith(written((*path[:-1], new or "x")) + ":")
    if old != "t" and len(old) > 2:
        assert old in message  # the closest, or among the known


@pytest.mark.parametrize("method", TABLE)
def test_every_parameter_of_every_method_is_known(method):
    spec = TABLE[method]
    base = "base_model: m0\n" if spec.base == "required" else ""
    count = max(spec.least, 1) + bool(base)
    models = "".join(f"- model: m{i}\n" for i in range(count))
    text = f"merge_method: {method}\n{base}models:\n{models}"
    for name in spec.per_source | spec.shared:
        assert name in read(f"{text}parameters: {{{name}: 1}}\n")[0].parameters
        said = error(f"{text}parameters: {{{name}x: 1}}\n")
        assert said.startswith(f"parameters.{name}x: unknown parameter of {method}")
        assert name in said


MISTAKES = {
    "no method": ("models: [{model: a}]\n", "merge_method: is required and missing"),
    "no input": ("merge_method: linear\n", "exactly one of models, slices and modules"),
    "two inputs": (
        MODELS + "slices: [{sources: []}]\n",
        "exactly one of models, slices and modules was expected; found models and",
    ),
    "unknown method": (
        MODELS.replace("linear", "dare-ties"),
        "merge_method: unknown method 'dare-ties'; did you mean dare_ties",
    ),
    "method is a number": (
        MODELS.replace("linear", "3"),
        "merge_method: found the num",
    ),
    "twice the same": (
        MODELS.replace("model: b", "model: {model: a}"),
        "models[1]: a stands already at models[0]",
    ),
    "no base": (MODELS.replace("linear", "ties"), "base_model: is required by ties"),
    "too many": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\n"
        "parameters: {t: 1}\n",
        "models: slerp takes exactly 1 source beside the base; found 2",
    ),
    "too few": (
        "merge_method: model_stock\nbase_model: a\nmodels: [{model: b}]\n",
        "models: model_stock takes at least 2 sources beside the base; found 1",
    ),
    "passthrough of two": (
        MODELS.replace("linear", "passthrough").replace("weight", "scale"),
        "models: passthrough takes exactly 1 source; found 2",
    ),
    "a model is no mapping": (
        "merge_method: linear\nmodels: [a]\n",
        "models[0]: found the text 'a'; a mapping with model, parameters",
    ),
    "models are no list": (
        "merge_method: linear\nmodels: {model: a}\n",
        "models: found",
    ),
    "no model": (
        "merge_method: linear\nmodels: [{parameters: {}}]\n",
        "models[0].model",
    ),
    "bad reference": (
        "merge_method: linear\nbase_model: a@b@c\nmodels: [{model: a}]\n",
        "base_model: 'a@b@c' is not PATH or PATH@REVISION",
    ),
    "both tokenizers": (
        MODELS + "tokenizer_source: base\ntokenizer: {source: base}\n",
        "tokenizer: stands beside tokenizer_source",
    ),
    "bad type": (
        MODELS + "dtype: bfloat\n",
        "dtype: unknown type 'bfloat'; did you mean",
    ),
    "integers": (MODELS + "out_dtype: int64\n", "out_dtype: unknown type 'int64'"),
    "a value that is null": (
        MODELS + "parameters: {normalize: }\n",
        "parameters.normalize: is empty; true or false was expected",
    ),
    "a value of another kind": (
        MODELS + "parameters: {normalize: 2}\n",
        "parameters.normalize: found the number 2; true or false was expected",
    ),
    "an empty gradient": (
        MODELS + "parameters: {weight: []}\n",
        "parameters.weight: is e",
    ),
    "a gradient in a gradient": (
        MODELS + "parameters: {weight: [1, [2]]}\n",
        "parameters.weight[1]: found a list; a number was expected",
    ),
    "a number among filters": (
        MODELS + "parameters: {weight: [{value: 1}, 2]}\n",
        "parameters.weight[1]: found the number 2; a mapping with filter, value",
    ),
    "a filter without value": (
        MODELS + "parameters: {weight: [{filter: mlp}]}\n",
        "parameters.weight[0].value: is required and missing",
    ),
    "a shared parameter of one source": (
        MODELS.replace("{weight: 1}", "{weight: 1, normalize: false}"),
        "models[0].parameters.normalize: normalize is one value for all sources",
    ),
    "a range backwards": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 1]}"
        "]}]\n",
        "slices[0].sources[0].layer_range: found [3, 1]",
    ),
    "no range": (
        "merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n",
        "slices[0].sources[0].layer_range: is required and missing",
    ),
    "ranges of unequal lengths": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, "
        "{model: b, layer_range: [0, 3]}]}]\n",
        "slices[0]: sources need as many layers each; found slices[0].sources[0]: 2, ",
    ),
    "base not in the slice": (
        "merge_method: ties\nbase_model: c\n"
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n",
        "slices[0].sources: the base model c is not among them",
    ),
    "a module of nothing": (
        "merge_method: linear\nmodules: {default: {parameters: {}}}\n",
        "modules.default: either models or slices was expected",
    ),
    "a base of a module": (
        "merge_method: linear\n"
        "modules: {default: {base_model: a, models: [{model: a}]}}\n",
        "modules.default.base_model: unknown key",
    ),
    "a token without a row": (
        MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n",
        "tokenizer.tokens.x.source: either token or token_id was expected",
    ),
    "an unknown template": (MODELS + "chat_template: lama\n", "chat_template: unknown"),
    "no YAML": ("merge_method: linear\nmodels: [\n", "line 3, column 1: "),
    "a tab": ("merge_method: linear\n\tmodels: 1\n", "line 2, column 1: "),
    "a key twice": (
        MODELS + "merge_method: ties\n",
        "line 6, column 1: the key merge_me",
    ),
    "nothing": ("\n---\n", "the configuration is empty"),
    "a list": ("- merge_method\n", "document 1 is no mapping"),
    "an old key": (
        MODELS + "input_model_parameters: {}\n",
        "input_model_parameters: unknown key",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_where_they_are(name):
    text, said = MISTAKES[name]
    assert error(text).startswith(said)


def test_what_has_no_effect_is_told():
    text = """
        merge_method: task_arithmetic
        base_model: a
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: b, parameters: {weight: 1, gamma: 2}}
        """
    [merge] = read(textwrap.dedent(text))
    assert merge.notes == (
        "parameter gamma has no effect: task_arithmetic does not use it",
        "models[0]: weight of the base model has no effect",
    )


def test_a_base_of_linear_is_one_more_source():
    [merge] = read(MODELS + "base_model: c\n")
    assert [s.where for s in merge.modules[""].models][-1] == "base_model"
    assert [r.model.path for r in references(merge)] == ["c", "a", "b"]


STAGES = """
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
---
name: second
merge_method: slerp
base_model: a
models: [{model: b}]
parameters: {t: 0.5}
---
name: first
merge_method: linear
models: [{model: second+lora, parameters: {weight: 1}}]
---
"""


def test_tokens_of_other_documents_are_uses():
    last = "tokenizer: {source: second}\n---\n"
    text = STAGES.replace("second+lora", "d").replace("---\n", last, 1)
    assert [merge.name for merge in read(text)] == ["first", "second", None]


def test_documents_follow_those_that_they_use():
    assert [merge.name for merge in read(STAGES)] == ["second", "first", None]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: first", "name: second", "name: two documents have the name second"),
        ("name: first\n", "", "name: two documents have no name"),
        (
            "{model: b}",
            "{model: first}",
            "name: documents use each other in a circle: fi",
        ),
        ("second+lora", "other", "name: only one result can be wanted"),
        ("t: 0.5", "r: 0.5\n  u: 1", "line "),
        (
            "{t: 0.5}",
            "{tt: 0.5}",
            "document 2: parameters.tt: unknown parameter of sle",
        ),
    ],
    ids=["twice", "two unnamed", "circle", "two ends", "syntax", "inside"],
)
def test_mistakes_between_documents(old, new, said):
    assert error(STAGES.replace(old, new)).startswith(said)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(MODELS)
    assert read(path) == read(str(path)) == read(MODELS)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other.yml")
