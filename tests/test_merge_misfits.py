"""Models that do not fit a configuration: messages name the place and the tensor."""

import merge_models as small
import pytest
from merge_models import LINEAR, STACK, error, facts

from collab_jax.merge.plan.targets import ModelFacts


def renamed(old, new):
    """A model with one tensor under another name, or without it."""
    shapes = small.llama()
    shape = shapes.pop(old)
    return facts(shapes | ({new: shape} if new else {}))


UP = "model.layers.1.mlp.up_proj.weight"
MISFITS = {
    "missing": (LINEAR, renamed(UP, None), f"models[1]: tensor {UP} is missing from b"),
    "renamed": (
        LINEAR,
        renamed(UP, "model.layers.1.mlp.upp.weight"),
        "models[1]: b has the tensor model.layers.1.mlp.upp.weight, which a lacks",
    ),
    "more": (
        LINEAR,
        facts(small.llama() | {"score.weight": (2, 4)}),
        "models[1]: b has the tensor score.weight, which a lacks",
    ),
    "no norm": (
        LINEAR,
        renamed("model.norm.weight", None),
        "models[1]: tensor model.norm.weight is missing from b and needed to match a; "
        "the closest there is ",
    ),
    "wider": (
        LINEAR,
        facts(small.llama(width=8)),
        "models[1]: model.embed_tokens.weight",
    ),
    "another shape": (
        LINEAR,
        facts(small.llama() | {UP: (4, 8)}),
        f"models[1]: {UP} is [4, 8] in b and [8, 4] in a; only models",
    ),
    "deeper": (
        LINEAR,
        facts(small.llama(4)),
        "models[1]: b has 4 layers in model.layers",
    ),
    "a gap": (
        LINEAR,
        facts({n: s for n, s in small.llama().items() if ".1." not in n}),
        "b: layer 1 of model.layers is missing",
    ),
    "empty": (LINEAR, facts({}), "b: the checkpoint holds no tensors"),
    "out of bounds": (
        STACK,
        facts(small.llama(2)),
        "slices[1].sources[0].layer_range: ends at 3, b has 2 layers",
    ),
    "an empty slice": (
        STACK.replace("[1, 3]", "[1, 1]"),
        facts(),
        "slices[1].sources[0].layer_range: [1, 1] is empty",
    ),
    "no layers": (STACK, facts({"norm.weight": (4,)}), "slices: b has no layers"),
    "another family": (
        STACK,
        ModelFacts(small.layouts(small.gpt2()), {}),
        "slices: the layers of b are transformer.h, others are model.layers",
    ),
    "no weight": (
        LINEAR.replace("parameters: {weight: 1}", ""),
        facts(),
        "models[0].parameters.weight: is required and missing (for model.embed_tokens",
    ),
    "no weight of the base": (
        "merge_method: linear\nbase_model: b\n"
        "models: [{model: a, parameters: {weight: 1}}]\n",
        facts(),
        "base_model is one more source of linear, name it there too; base_model.param",
    ),
    "no filter matches": (
        LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: 1}]"),
        facts(),
        "parameters.weight: no filter matches the tensor model.embed_tokens.weight",
    ),
    "a gradient of a whole number": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {max_iter: [1, 2]}\n",
        facts(),
        "parameters.max_iter: the gradient gives 1.5 for a layer; a whole number",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_told_where_they_are(name):
    text, model, said = MISFITS[name]
    assert error(text, b=model).startswith(said)


def test_a_misfit_in_a_slice_names_the_layer():
    text = """
        merge_method: linear
        slices:
        - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
        parameters: {weight: 1}
        """
    name = "model.layers.2.mlp.up_proj.weight"
    said = error(text, b=renamed(name, None))
    assert said.startswith(f"slices[0].sources[1]: tensor {name} is missing from b")
