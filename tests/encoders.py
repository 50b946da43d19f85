"""Small encoders of every family, with weights drawn from the tensors' names."""

import zlib

import numpy as np

from collab_jax.io import canonical
from collab_jax.io.encoder_names import rules
from collab_jax.models.encoder_config import from_hf

LENGTHS = (11, 1, 7)  # rows of unequal length, right-padded
TEXT = 11

_SIZES = {
    "vocab_size": 53,
    "hidden_size": 21,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 34,
    "max_position_embeddings": 17,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}

# name -> (config.json, whether there is a pooler)
CASES = {
    "bert": ({"model_type": "bert", **_SIZES}, True),
    "bert_tanh_gelu": (
        {
            "model_type": "bert",
            **_SIZES,
            "hidden_act": "gelu_new",
            "num_attention_heads": 7,
            "layer_norm_eps": 1e-5,
        },
        False,
    ),
    "roberta": (
        {
            "model_type": "roberta",
            **_SIZES,
            "type_vocab_size": 1,
            "pad_token_id": 1,
            "layer_norm_eps": 1e-5,
        },
        True,
    ),
    "distilbert": (
        {
            "model_type": "distilbert",
            "vocab_size": 53,
            "dim": 20,
            "n_layers": 2,
            "n_heads": 5,
            "hidden_dim": 33,
            "max_position_embeddings": 13,
            "pad_token_id": 0,
        },
        False,
    ),
}


def config(name):
    """The configuration of a case."""
    hf, pooler = CASES[name]
    made = from_hf(hf)
    return type(made)(**{**vars(made), "pooler": pooler})


def tensors(made):
    """Checkpoint tensors by name, drawn from their names."""
    return drawn(rules(made))


def drawn(found):
    """The tensors of some rules, drawn from their names; gains of norms are near 1."""
    tensors = {}
    for rule in found:
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            value = rng.normal(size=shape) * (0.3 if len(shape) == 2 else 0.2)
            if name.endswith("orm.weight"):
                value += 1
            tensors[name] = value.astype(np.float32)
    return tensors


def params(made):
    """The params tree of the same weights."""
    return canonical.tree_of(rules(made), tensors(made).__getitem__)


def texts(made):
    """Tokens `[B, T]`, lengths `[B]` and token types `[B, T]`; padding is random."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(2, made.vocab, (len(LENGTHS), TEXT)).astype(np.int32)
    types = rng.integers(0, max(made.token_types, 1), tokens.shape).astype(np.int32)
    return tokens, np.array(LENGTHS, np.int32), types
