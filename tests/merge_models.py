"""Small checkpoints for tests of merge plans: names and shapes of known families."""

import json
import textwrap

import numpy as np
import pytest

from collab_jax.io.safetensors import DTYPES, Layout, write
from collab_jax.merge.plan.config import read
from collab_jax.merge.plan.resolve import plan
from collab_jax.merge.plan.targets import ModelFacts

F32, INT = DTYPES["F32"], DTYPES["I64"]
WIDTH, ROWS = 4, 12


def llama(layers=3, head=True, rows=ROWS, width=WIDTH, bias=False):
    """Names and shapes of a llama, or with `bias` of a qwen2."""
    shapes = {"model.embed_tokens.weight": (rows, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (width,)
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (width, width)
            if bias and name != "o":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
        for name in ("up", "gate"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (2 * width, width)
        shapes[f"{at}.mlp.down_proj.weight"] = (width, 2 * width)
    shapes["model.norm.weight"] = (width,)
    if head:
        shapes["lm_head.weight"] = (rows, width)
    return shapes


def gpt2(layers=3, prefix="transformer.", rows=ROWS, width=WIDTH):
    """Names and shapes of a GPT-2, whose head is tied."""
    shapes = {f"{prefix}wte.weight": (rows, width), f"{prefix}wpe.weight": (8, width)}
    for i in range(layers):
        at = f"{prefix}h.{i}"
        for name, out in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            shapes[f"{at}.{name}.weight"] = (width, out * width)
            shapes[f"{at}.{name}.bias"] = (out * width,)
        shapes[f"{at}.mlp.c_proj.weight"] = (4 * width, width)
        shapes[f"{at}.mlp.c_proj.bias"] = (width,)
        for name in ("ln_1", "ln_2"):
            shapes[f"{at}.{name}.weight"] = shapes[f"{at}.{name}.bias"] = (width,)
    shapes |= {f"{prefix}ln_f.weight": (width,), f"{prefix}ln_f.bias": (width,)}
    return shapes


def t5(layers=2, rows=ROWS, width=WIDTH):
    """Names and shapes of a T5: an encoder and a decoder on shared embeddings."""
    shapes = {"shared.weight": (rows, width), "lm_head.weight": (rows, width)}
    for part, subs in (("encoder", 2), ("decoder", 3)):
        for i in range(layers):
            at = f"{part}.block.{i}.layer"
            for name in "qkvo":
                shapes[f"{at}.0.SelfAttention.{name}.weight"] = (width, width)
                if subs == 3:
                    shapes[f"{at}.1.EncDecAttention.{name}.weight"] = (width, width)
            for name in ("wi_0", "wi_1", "wo"):
                shapes[f"{at}.{subs - 1}.DenseReluDense.{name}.weight"] = (width, width)
            for j in range(subs):
                shapes[f"{at}.{j}.layer_norm.weight"] = (width,)
        shapes[f"{part}.final_layer_norm.weight"] = (width,)
    return shapes


def config(family, layers=3, **more):
    """config.json of such a model."""
    if family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": layers,
            "n_embd": WIDTH,
            "n_head": 2,
            "vocab_size": ROWS,
        } | more
    if family == "t5":
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "d_model": WIDTH,
            "vocab_size": ROWS,
        } | more
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    names |= {"gemma": "GemmaForCausalLM"}
    return {
        "architectures": [names[family]],
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "vocab_size": ROWS,
    } | more


def layouts(shapes, dtype=F32):
    """Shapes as layouts of one type."""
    return {name: Layout(dtype, shape) for name, shape in shapes.items()}


def save(folder, shapes, config, dtype=F32):
    """A folder with a checkpoint of zeros."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    table = layouts(shapes, dtype)
    zeros = (np.zeros(shape, dtype) for shape in shapes.values())
    write(folder / "model.safetensors", table, zeros)
    return folder


LINEAR = (
    "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
)
STACK = """
    merge_method: passthrough
    slices:
    - sources: [{model: a, layer_range: [0, 2]}]
    - sources: [{model: b, layer_range: [1, 3]}]
    dtype: bfloat16
    """


def facts(shapes=None, dtype=F32, **more):
    """A model of three layers, or of other shapes."""
    shapes = llama() if shapes is None else shapes
    return ModelFacts(layouts(shapes, dtype), config("llama") | more)


def stages(text, **models):
    """The plan of a text; models that are not given are all alike."""
    merges = read(textwrap.dedent(text))
    return plan(merges, lambda r: models.get(r.model.path, facts()))


def error(text, **models):
    """What is said about models that do not fit."""
    with pytest.raises(ValueError, match=":") as caught:
        stages(text, **models)
    assert "\n" not in str(caught.value)
    return str(caught.value)
