"""Checkpoint tensors to leaves and back, bit by bit, for every family."""

import families
import jax
import ml_dtypes
import numpy as np
import pytest

from collab_jax.io import canonical, names
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init


@pytest.mark.parametrize("name", families.CASES)
def test_round_trip(name):
    config = from_hf(families.CASES[name])
    given = families.tensors(config)
    given = {k: v.astype(ml_dtypes.bfloat16) for k, v in given.items()}
    tree = canonical.load_tree(config, given.__getitem__)
    saved = dict(canonical.save_tree(config, tree))
    assert list(saved) == list(given)
    for key, value in given.items():
        assert saved[key].dtype == value.dtype
        assert saved[key].flags.c_contiguous
        np.testing.assert_array_equal(saved[key], value, err_msg=key)

    # the tree is the model's, and every leaf and tensor appears once
    model = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(
        lambda leaf: leaf.shape, model
    )
    rules = names.rules(config)
    paths = [path for rule in rules for path in rule.paths]
    assert len(set(paths)) == len(paths) == len(jax.tree.leaves(model))
    tensors = [name for rule in rules for name in rule.names]
    assert len(set(tensors)) == len(tensors)
    for rule in rules:
        assert len(rule.names) == len(rule.shapes)


def test_a_wrong_shape_names_the_tensor():
    config = from_hf(families.CASES["llama"])
    given = families.tensors(config)
    key = "model.layers.1.mlp.up_proj.weight"
    given[key] = given[key].T
    with pytest.raises(ValueError, match=rf"{key} has shape \(36, 50\).*\(50, 36\)"):
        canonical.load_tree(config, given.__getitem__)


NAMES = [
    ("gpt2", "wte.weight", "transformer.wte.weight"),
    ("gpt2", "transformer.h.0.attn.bias", None),
    ("gpt2", "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
    ("gpt2", "lm_head.weight", None),
    ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", None),
    ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", None),
    ("gpt_neox", "embed_out.weight", "embed_out.weight"),
    ("gemma3", "language_model.model.norm.weight", "model.norm.weight"),
    ("gemma3", "model.language_model.norm.weight", "model.norm.weight"),
    ("gemma3", "vision_tower.vision_model.post_layernorm.bias", None),
    ("gemma3", "model.multi_modal_projector.mm_input_projection_weight", None),
    ("llama", "model.norm.weight", "model.norm.weight"),
    ("llama", "lm_head.weight", "lm_head.weight"),
]


@pytest.mark.parametrize(("family", "found", "expected"), NAMES)
def test_names_on_disk(family, found, expected):
    config = from_hf(families.CASES[family])
    assert names.canonical(config, found) == expected


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "mixtral"])
def test_arrays_of_jax_stay_there(name):
    """Under jit, trees become checkpoints and back; nothing goes through the host."""
    case = next(key for key in families.CASES if key.startswith(name))
    config = from_hf(families.CASES[case])
    given = {k: jax.numpy.asarray(v) for k, v in families.tensors(config).items()}
    there = jax.jit(lambda t: canonical.from_checkpoint(config, t))
    back = jax.jit(lambda p: canonical.to_checkpoint(config, p))
    found = back(there(given))
    for key, value in given.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
