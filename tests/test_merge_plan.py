"""Plans of merges: layers, heads, buffers, modules, stages.

Parameters and sources are compared with mergekit's planner in tests/parity.
"""

import textwrap
import time

import merge_models as small
import pytest
from merge_models import LINEAR, STACK, error, facts, stages

from collab_jax.io.safetensors import DTYPES, Layout
from collab_jax.merge.plan.config import read
from collab_jax.merge.plan.resolve import plan
from collab_jax.merge.plan.stage import describe
from collab_jax.merge.plan.targets import ModelFacts


def targets(text, **models):
    """The targets of the last stage by name."""
    return {target.name: target for target in stages(text, **models)[-1].targets}


def test_a_merge_has_one_target_per_tensor():
    [stage] = stages(LINEAR)
    assert [t.name for t in stage.targets] == list(small.llama())
    embed, norm = stage.targets[0], stage.targets[-2]
    assert [tuple(s) for s in embed.sources] == [("a", embed.name), ("b", embed.name)]
    assert embed.knobs == {"normalize": True, "weight": (1.0, 1.0)}
    assert (embed.vocabulary_axis, norm.vocabulary_axis) == (0, None)
    assert (stage.donor, stage.base, stage.config, stage.layers) == ("a", None, {}, {})


def test_slices_number_layers_anew_and_config_follows():
    kinds = {"layer_types": ["full", "sliding", "full"], "torch_dtype": "float32"}
    [stage] = stages(STACK, a=facts(**kinds), b=facts(layer_types=["full"] * 3))
    found = {t.name: t.sources for t in stage.targets}
    at = "model.layers.{}.mlp.up_proj.weight"
    froms = [tuple(found[at.format(i)][0]) for i in range(4)]
    expected = [("a", 0), ("a", 1), ("b", 1), ("b", 2)]
    assert froms == [(model, at.format(i)) for model, i in expected]
    assert at.format(4) not in found
    assert found["model.embed_tokens.weight"][0].model == "a"
    assert found["model.norm.weight"][0].model == "b"
    assert found["lm_head.weight"][0].model == "b"
    assert stage.layers == {"": 4}
    assert stage.config == {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "full", "full"],
        "torch_dtype": "bfloat16",
    }


def test_a_head_of_its_own_unties_the_result():
    tied = facts(small.llama(head=False), tie_word_embeddings=True)
    [stage] = stages(LINEAR, a=tied)
    head = {t.name: t for t in stage.targets}["lm_head.weight"]
    assert [s.name for s in head.sources] == ["model.embed_tokens.weight", head.name]
    assert stage.config == {"tie_word_embeddings": False}
    [stage] = stages(LINEAR, a=tied, b=tied)
    assert "lm_head.weight" not in {t.name for t in stage.targets}
    assert stage.config == {}
    [stage] = stages(LINEAR, b=tied)  # the donor has its head and says nothing
    assert stage.config == {}
    said = error(LINEAR, b=facts(small.llama(head=False), tie_word_embeddings=False))
    assert said.startswith("models[1]: lm_head.weight is missing from b, whose config")


def test_buffers_are_copied():
    extra = {
        "model.rotary_emb.inv_freq": Layout(small.F32, (2,)),
        "model.layers.1.self_attn.rotary_emb.inv_freq": Layout(small.F32, (2,)),
        "model.position_ids": Layout(small.INT, (1, 8)),
    }
    full = facts()._replace(layouts=small.layouts(small.llama()) | extra)
    text = LINEAR + "out_dtype: float16\n"
    found = targets(text, a=full, b=full)
    for name in extra:
        assert found[name].method == "copy"
        assert found[name].layout == extra[name]
        assert [s.model for s in found[name].sources] == ["a", "b"]
    assert [s.model for s in targets(text, a=full)["model.position_ids"].sources] == [
        "a"
    ]
    assert not set(targets(text, b=full)) & set(extra)
    other = dict(full.layouts) | {"model.position_ids": Layout(small.INT, (1, 9))}
    said = error(text, a=full, b=full._replace(layouts=other))
    assert said.startswith(
        "models[1]: the buffer model.position_ids is int64[1, 9] in b"
    )


@pytest.mark.parametrize(
    ("more", "types", "expected"),
    [
        ("", ("F32", "F32"), "float32"),
        ("", ("BF16", "BF16"), "bfloat16"),
        ("", ("BF16", "F16"), "float32"),
        ("", ("BF16", "F64"), "float64"),
        ("dtype: float16\n", ("BF16", "F32"), "float16"),
        ("dtype: float32\nout_dtype: bfloat16\n", ("F16", "F16"), "bfloat16"),
    ],
)
def test_types_of_results(more, types, expected):
    models = {n: facts(dtype=DTYPES[t]) for n, t in zip("ab", types, strict=True)}
    found = targets(LINEAR + more, **models)
    assert {t.layout.dtype.name for t in found.values()} == {expected}


def test_a_method_that_widens():
    text = "merge_method: arcee_fusion\nbase_model: a\nmodels: [{model: b}]\n"
    half = facts(dtype=DTYPES["BF16"])
    assert targets(text, a=half, b=half)["model.norm.weight"].layout.dtype == small.F32


def test_a_base_alone_is_passed_through():
    text = "merge_method: sce\nbase_model: a\nmodels: [{model: a}]\n"
    norm = targets(text)["model.norm.weight"]
    assert (norm.method, norm.base, norm.knobs) == (
        "passthrough",
        None,
        {"scale": (None,)},
    )


def test_names_with_and_without_their_first_part():
    shapes = {name: small.gpt2(prefix=name) for name in ("transformer.", "")}
    long, short = (ModelFacts(small.layouts(s), {}) for s in shapes.values())
    found = targets(LINEAR, a=long, b=short)
    assert set(found) == set(shapes["transformer."])
    assert [s.name for s in found["transformer.h.0.ln_1.bias"].sources] == [
        "transformer.h.0.ln_1.bias",
        "h.0.ln_1.bias",
    ]
    found = targets(LINEAR, a=short, b=long)
    assert set(found) == set(shapes[""])
    assert found["wte.weight"].sources[1].name == "transformer.wte.weight"


VISION = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"n": 1}}


def picture_model(layers=2):
    """A language model with a vision tower and a projector."""
    shapes = {f"language_model.{name}": s for name, s in small.llama(3).items()}
    for i in range(layers):
        shapes[f"vision_tower.encoder.layers.{i}.fc.weight"] = (4, 4)
    shapes |= {"vision_tower.embeddings.patch_embedding.weight": (4, 4)}
    shapes |= {"vision_tower.post_layernorm.weight": (4,)}
    shapes |= {"multi_modal_projector.linear_1.weight": (4, 4)}
    text = {"num_hidden_layers": 3, "vocab_size": small.ROWS}
    config = {"text_config": text, "vision_config": {"num_hidden_layers": layers}}
    return ModelFacts(small.layouts(shapes), config)


MODULES = """
    merge_method: passthrough
    modules:
      text_decoder:
        slices:
        - sources: [{model: a, layer_range: [0, 3]}]
        - sources: [{model: a, layer_range: [2, 3]}]
      vision_tower: {models: [{model: b}]}
      multi_modal_projector: {models: [{model: a}]}
    """


def test_modules_are_planned_apart():
    a, b = picture_model(), picture_model()
    [stage] = stages(MODULES, a=a, b=b)
    models = {t.name: t.sources[0].model for t in stage.targets}
    assert len(models) == len(a.layouts) + 9
    assert all((m == "b") == n.startswith("vision") for n, m in models.items())
    assert stage.layers == {"text_decoder": 4}
    assert stage.config == {"text_config.num_hidden_layers": 4}


def test_modules_that_do_not_fit():
    a = picture_model()
    said = error(MODULES.replace("vision_tower", "vision_towr"), a=a, b=a)
    assert said.startswith("modules.vision_towr: unknown module 'vision_towr'; did you")
    cut = MODULES.replace("multi_modal_projector: {models: [{model: a}]}", "")
    assert "such as multi_modal_projector" in error(cut, a=a, b=a)
    said = error(STACK, a=a, b=a)
    assert "several stacks of layers" in said
    assert "use modules" in said


def test_stages_build_on_results():
    text = """
        name: taller
        merge_method: passthrough
        slices:
        - sources: [{model: a, layer_range: [0, 3]}]
        - sources: [{model: a, layer_range: [1, 2]}]
        out_dtype: float16
        ---
        merge_method: linear
        models: [{model: taller}, {model: b}]
        parameters: {weight: 1}
        """
    asked = []
    four = ModelFacts(small.layouts(small.llama(4)), small.config("llama", 4))

    def layouts(reference):
        asked.append(reference.model.path)
        return four if reference.model.path == "b" else facts()

    first, last = plan(read(textwrap.dedent(text)), layouts)
    assert asked == ["a", "b"]
    assert (first.name, last.earlier) == ("taller", {"taller": "taller"})
    assert len(last.targets) == len(small.llama(4))
    assert last.config == {}  # the donor is the stage, whose config has four layers
    with pytest.raises(ValueError, match=r"document 2: models\[1\]: b has 3 layers"):
        stages(text)


def test_rows_of_tokens_need_a_tokenizer():
    wide = facts(small.llama(rows=14), vocab_size=14)
    said = error(LINEAR, b=wide)
    assert said.startswith(
        "models[1]: model.embed_tokens.weight is [14, 4] in b and [12"
    )
    assert "set tokenizer" in said
    found = targets(LINEAR + "tokenizer: {source: union}\n", b=wide)
    assert [n for n, t in found.items() if t.vocabulary_axis == 0] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert "rows for unequal numbers of tokens" in error(STACK, b=wide)


def test_what_configs_say_otherwise_is_told():
    [stage] = stages(LINEAR, a=facts(rope_theta=1e4), b=facts(rope_theta=1e6))
    assert stage.notes == (
        "rope_theta is 1000000.0 in b and 10000.0 in a, whose config.json the result "
        "takes",
    )


def test_experts_on_their_own_are_told():
    name = "model.layers.{}.mlp.experts.0.up_proj.weight"
    model = facts(small.llama() | {name.format(i): (4, 4) for i in range(3)})
    ties = LINEAR.replace("linear", "ties") + "base_model: a\n"
    [by_tensor], [by_element] = (stages(t, a=model, b=model) for t in (ties, LINEAR))
    assert by_tensor.notes[0].startswith("each expert of a layer is merged on its own")
    assert by_element.notes == ()


def test_a_plan_in_words():
    lines = describe(stages(STACK)[0]).splitlines()
    assert lines[0] == "passthrough of 2 models: a, b"
    assert "  39 tensors by passthrough" in lines
    assert "  4 layers in the model" in lines
    assert "  config.json: num_hidden_layers becomes 4" in lines


def test_twenty_thousand_tensors_in_three_seconds():
    shapes = dict.fromkeys(
        (
            f"model.layers.{i}.mlp.experts.{j}.{name}_proj.weight"
            for i in range(52)
            for j in range(128)
            for name in ("up", "gate", "down")
        ),
        (8, 4),
    )
    model = facts(small.llama(52) | shapes)
    text = """
        merge_method: ties
        base_model: a
        models: [{model: b}, {model: c}]
        parameters:
          weight: [{filter: up, value: [0, 1]}, {value: 1}]
          density: [0.2, 0.8]
        """
    start = time.process_time()
    [stage] = stages(text, a=model, b=model, c=model)
    assert len(stage.targets) == len(model.layouts) > 20_000
    assert time.process_time() - start < 3  # about 1 s
