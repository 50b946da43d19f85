"""Small translation models, with weights drawn from the tensors' names."""

import encoders
import numpy as np

from collab_jax.io import canonical
from collab_jax.io.marian_names import rules
from collab_jax.models.marian_config import from_hf

LENGTHS = (11, 1, 7)  # of the sources, right-padded
NEW, BEAMS = 9, 3  # tokens of a search

_SIZES = {
    "model_type": "marian",
    "vocab_size": 53,
    "d_model": 21,  # odd: one more sine than cosines
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 34,
    "decoder_layers": 3,
    "decoder_attention_heads": 7,
    "decoder_ffn_dim": 25,
    "max_position_embeddings": 40,
    "eos_token_id": 0,
}

# name -> config.json
CASES = {
    "shared": {
        **_SIZES,
        "activation_function": "swish",
        "scale_embedding": True,
        "decoder_start_token_id": 52,
        "pad_token_id": 52,
    },
    "apart": {
        **_SIZES,
        "decoder_vocab_size": 37,
        "share_encoder_decoder_embeddings": False,
        "activation_function": "gelu",
        "decoder_start_token_id": 36,
        "pad_token_id": 36,
    },
    "untied": {
        **_SIZES,
        "d_model": 24,
        "decoder_attention_heads": 4,
        "decoder_vocab_size": 37,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
        "activation_function": "relu",
        "scale_embedding": True,
        "decoder_start_token_id": 5,
        "pad_token_id": 36,
    },
}


def config(name):
    """The configuration of a case."""
    return from_hf(CASES[name])


def tensors(made):
    """Checkpoint tensors by name, drawn from their names."""
    return encoders.drawn(rules(made))


def params(made):
    """The params tree of the same weights."""
    return canonical.tree_of(rules(made), tensors(made).__getitem__)


def sources(made):
    """Source tokens `[3, 11]`, which end with the end token, and lengths `[3]`."""
    rng = np.random.default_rng(5)
    shape = len(LENGTHS), max(LENGTHS)
    tokens = rng.integers(1, made.source_vocab - 1, shape).astype(np.int32)
    tokens[range(len(LENGTHS)), np.array(LENGTHS) - 1] = 0
    return tokens, np.array(LENGTHS, np.int32)


def texts(made):
    """A text for each source, `[3, 8]`, which begins with the start token."""
    rng = np.random.default_rng(6)
    tokens = rng.integers(1, made.vocab - 1, (len(LENGTHS), 8)).astype(np.int32)
    tokens[:, 0] = made.start
    return tokens
