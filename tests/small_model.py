"""A small Llama with a byte-level tokenizer, for tests of loading and saving."""

import functools

import jax
import jax.numpy as jnp
from gguf_files import alphabet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collab_jax import lm as lms
from collab_jax.io.load import Model
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer

CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 257,
    }
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"


def tokenizer():
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(alphabet())}, [("t", "h")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


@functools.cache
def model(dtype=jnp.float32) -> Model:
    backbone = transformer(CONFIG)
    params = init(jax.random.key(0), CONFIG, dtype)
    return Model(params, lms.language_model(backbone), backbone, tokenizer(), CONFIG)
