"""Merge plans against mergekit 0.1.5's own planner, on checkpoints of zeros.

Compared are, for every tensor of the result: its method's parameters, the order of its
sources and its base, and which tensor of which checkpoint each source is.
"""

import json
import logging
import random
import textwrap
import warnings

import merge_models as small
import pytest

from collab_jax.io.safetensors import open_folder
from collab_jax.merge.plan.config import read
from collab_jax.merge.plan.resolve import plan
from collab_jax.merge.plan.targets import ModelFacts

pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import yaml
    from mergekit import merge_methods
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

logging.getLogger("mergekit").setLevel(logging.ERROR)


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """A folder with small models; tests run inside it."""
    folder = tmp_path_factory.mktemp("models")
    for name in "abc":
        small.save(folder / name, small.llama(), small.config("llama"))
    tied = small.config("llama", tie_word_embeddings=True)
    small.save(folder / "tied", small.llama(head=False), tied)
    small.save(folder / "deep", small.llama(5), small.config("llama", 5))
    for name in ("one", "two"):
        small.save(folder / name, small.llama(1), small.config("llama", 1))
    for name in ("q", "r"):
        shapes = small.llama(head=name == "q", bias=True)
        small.save(folder / name, shapes, small.config("qwen2"))
    small.save(folder / "g", small.llama(head=False), small.config("gemma"))
    small.save(folder / "h", small.llama(head=False), small.config("gemma"))
    small.save(folder / "gpt", small.gpt2(), small.config("gpt2"))
    small.save(folder / "short", small.gpt2(prefix=""), small.config("gpt2"))
    for name, layers in (("t", 2), ("u", 3)):
        small.save(folder / name, small.t5(layers), small.config("t5", layers))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def facts(reference):
    """What our planner is told of a model."""
    folder = reference.model.path
    with open(f"{folder}/config.json") as file:
        return ModelFacts(open_folder(folder).layouts, json.load(file))


def ours(text):
    """Name -> (base, sources, knobs) of our last stage."""
    stage = plan(read(textwrap.dedent(text)), facts)[-1]
    return {
        t.name: (t.base and tuple(t.base), [tuple(s) for s in t.sources], t.knobs)
        for t in stage.targets
    }


def theirs(text):
    """The same, from mergekit's planner."""
    merge = MergeConfiguration.model_validate(yaml.safe_load(textwrap.dedent(text)))
    options = MergeOptions(quiet=True)
    info = get_architecture_info(merge, options)
    cache = LoaderCache()
    cache.loaders = {}
    cache.setup(options)
    planner = MergePlanner(merge, info, options, _model_out_config(merge, info))
    planner._plan()
    method = merge_methods.get(merge.merge_method)
    ignored = method.spec.contract.base.value == "ignored"
    found = {}
    for weight, task in planner._tensors:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        tensors = {
            load.model: (str(load.model), load._resolve_name(cache.get(load.model)))
            for load in gather.arguments().values()
        }
        base = None if ignored else task.base_model
        order = [m for m in task.model_order if m != base and m in tensors]
        knobs = dict(task.parameters.items())
        for parameter in method.spec.input_parameters:
            knobs[parameter.name] = tuple(
                task.input_parameters[m][parameter.name] for m in order
            )
        found[weight.name] = (
            None if base is None else tensors[base],
            [tensors[m] for m in order],
            knobs,
        )
    return found


PLANS = {
    "scalars": """
        merge_method: linear
        models:
        - {model: a, parameters: {weight: 0.3}}
        - {model: b, parameters: {weight: 7e-1}}
        parameters: {normalize: no}
        """,
    "gradients": """
        merge_method: linear
        models:
        - {model: deep, parameters: {weight: [0, 0.5, 1, 0.2]}}
        - model: ./deep
          parameters: {weight: [1, "0.25"]}
        """,
    "filters": """
        merge_method: ties
        base_model: a
        models:
        - model: b
          parameters:
            weight:
            - {filter: mlp, value: [0.1, 0.9]}
            - {filter: layers.1, value: 0.2}
            - {filter: "*", value: 0.3}
            density: {filter: self_attn, value: 0.5}
        - model: c
          parameters: {weight: 1}
        parameters:
          density: [{filter: norm, value: 0.7}, {value: [0.8, 0.6]}]
          normalize: [true, false, true]
          lambda: [{filter: down, value: 2}, {value: 1.5}]
          int8_mask: "yes"
        """,
    "base among the models": """
        merge_method: dare_ties
        base_model: b
        models:
        - {model: a, parameters: {weight: 1, density: 0.5}}
        - {model: b}
        - {model: c, parameters: {weight: [1, 0]}}
        """,
    "slerp": """
        merge_method: slerp
        base_model: a
        models: [{model: a}, {model: b}]
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - value: 0.5
        """,
    "a base that is a source": """
        merge_method: karcher
        base_model: c
        models: [{model: a}, {model: b}]
        parameters: {max_iter: [1, 3], tol: 1e-3}
        """,
    "a base that needs a weight": """
        merge_method: linear
        base_model: c
        models:
        - {model: a, parameters: {weight: 3}}
        parameters: {weight: 2}
        """,
    "one layer": """
        merge_method: linear
        models:
        - {model: one, parameters: {weight: [0, 1]}}
        - {model: two, parameters: {weight: [1, 0]}}
        """,
    "stacked": """
        merge_method: passthrough
        slices:
        - sources: [{model: a, layer_range: [0, 2]}]
        - sources: [{model: deep, layer_range: [1, 4]}]
          parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}
        - sources:
          - {model: b, layer_range: [2, 3], parameters: {scale: [0, 3]}}
        """,
    "precedence": """
        merge_method: linear
        slices:
        - sources:
          - {model: a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
          - {model: b, layer_range: [1, 3]}
          parameters: {weight: {filter: layers.2, value: 5}}
        - sources:
          - model: b
            layer_range: [0, 1]
            parameters: {weight: {filter: layers.0.mlp, value: 9}}
          - {model: a, layer_range: [2, 3]}
        parameters: {weight: 0.25, normalize: false}
        """,
    "a base by slice": """
        merge_method: task_arithmetic
        base_model: a
        slices:
        - sources:
          - {model: a, layer_range: [0, 1]}
          - {model: b, layer_range: [1, 2]}
        - base_model: c
          sources:
          - {model: b, layer_range: [0, 2]}
          - {model: c, layer_range: [0, 2]}
        parameters: {weight: [0.5, 1]}
        """,
    "modules": """
        merge_method: linear
        modules:
          default:
            slices:
            - sources:
              - {model: a, layer_range: [0, 3], parameters: {weight: 1}}
              - {model: b, layer_range: [0, 3]}
            parameters: {weight: [0, 4]}
        parameters: {weight: 3}
        """,
    "a head from an embedding": """
        merge_method: linear
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: tied, parameters: {weight: {filter: lm_head, value: 2}}}
        parameters: {weight: 3}
        """,
    "a head from an embedding, the base is tied": """
        merge_method: nuslerp
        base_model: tied
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: b, parameters: {weight: 2}}
        """,
    "all tied": """
        merge_method: multislerp
        models: [{model: g}, {model: h}]
        parameters: {weight: [1, 2, 3]}
        """,
    "qwen2": """
        merge_method: della
        base_model: r
        models: [{model: q}]
        parameters: {weight: 0.4, epsilon: [0.1, 0.2], density: 0.6}
        """,
    "gpt2": """
        merge_method: model_stock
        base_model: gpt
        models: [{model: gpt}, {model: short}, {model: ./gpt}]
        parameters: {filter_wise: [false, true]}
        """,
    "encoder and decoder": """
        merge_method: linear
        models: [{model: t}, {model: ./t}]
        parameters: {weight: [{filter: encoder, value: [0, 1]}, {value: [2, 3]}]}
        """,
    "modules of an encoder and decoder": """
        merge_method: passthrough
        base_model: t
        modules:
          shared: {slices: [{sources: [{model: t, layer_range: [0, 1]}]}]}
          encoder:
            slices:
            - sources: [{model: t, layer_range: [0, 2]}]
            - sources: [{model: u, layer_range: [1, 3]}]
            parameters: {scale: [1, 2]}
          decoder: {slices: [{sources: [{model: u, layer_range: [0, 2]}]}]}
        """,
    "tokens aligned": """
        merge_method: breadcrumbs
        base_model: a
        models: [{model: b}]
        parameters: {weight: 1, gamma: 0.02}
        tokenizer: {source: base}
        """,
    "sce": """
        merge_method: sce
        base_model: a
        models: [{model: a}, {model: c}]
        parameters: {select_topk: [0.1, 1]}
        """,
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_mergekits(name):
    """Every parameter is the same to the last bit, every tensor has its sources."""
    made, expected = ours(PLANS[name]), theirs(PLANS[name])
    assert set(made) == set(expected)
    for tensor in expected:
        assert made[tensor] == expected[tensor], tensor


def drawn(seed):
    """A merge of random slices, with random settings on random levels."""
    draw = random.Random(seed)

    def value():
        numbers = [round(draw.uniform(-1, 2), 3) for _ in range(draw.randint(1, 4))]
        return numbers if draw.random() < 0.6 else numbers[0]

    def settings(*names):
        found = {}
        for name in names:
            if draw.random() < 0.5:
                continue
            found[name] = value()
            if draw.random() < 0.5:
                parts = ["mlp", "layers.1", "q_proj", "norm", "*", "lm_head", "embed"]
                rules = [
                    {"filter": part, "value": value()}
                    for part in draw.sample(parts, draw.randint(1, 3))
                ]
                more = [{"value": value()}] * draw.randint(0, 1)
                found[name] = rules + more
        return {"parameters": found}

    method = draw.choice(["linear", "task_arithmetic", "ties"])
    own = ("weight",) if method == "linear" else ("weight", "density")
    shared = () if method == "linear" else ("lambda",)
    slices = []
    for _ in range(draw.randint(1, 3)):
        length = draw.randint(1, 3)
        sources = []
        for model in ["a", *draw.sample(["b", "c", "deep"], 2)]:
            start = draw.randint(0, (5 if model == "deep" else 3) - length)
            source = {"model": model, "layer_range": [start, start + length]}
            sources.append(source | settings(*own))
        draw.shuffle(sources)
        slices.append({"sources": sources} | settings(*own, *shared))
    merge = {"merge_method": method, "slices": slices, "base_model": "a"}
    rest = settings(*own[1:], *shared)["parameters"]  # a weight for all that have none
    return yaml.safe_dump(merge | {"parameters": {"weight": value()} | rest})


@pytest.mark.parametrize("seed", range(12))
def test_drawn_plans_are_mergekits(seed):
    text = drawn(seed)
    assert ours(text) == theirs(text)


def test_a_gradient_read_elsewhere_is_noticed():
    """Control: a final norm read at t = 1 would not pass."""
    made, expected = ours(PLANS["gradients"]), theirs(PLANS["gradients"])
    wrong = made["model.layers.4.mlp.up_proj.weight"][2]
    assert made["model.norm.weight"][2] == expected["model.norm.weight"][2] != wrong


def test_unequal_slices_keep_every_source():
    """mergekit drops all but the first source of the last slice; here they stay."""
    text = """
        merge_method: linear
        slices:
        - sources: [{model: a, layer_range: [0, 1]}]
        - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
        parameters: {weight: 1}
        """
    made, expected = ours(text), theirs(text)
    inner = [name for name in expected if "layers" in name]
    assert all(made[name] == expected[name] for name in inner)
    assert [model for model, _ in expected["model.norm.weight"][1]] == ["a"]
    assert [model for model, _ in made["model.norm.weight"][1]] == ["a", "b"]
