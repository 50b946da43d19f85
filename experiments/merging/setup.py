"""The models that experts are made from: SmolLM2-135M, and a toy for a quick look."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from merging.data import Encode
from merging.experts import Recipe, Tensors

from collab_jax.io import canonical
from collab_jax.io.hub import cache

NAME = "smollm2-135m-instruct"


class Setup(NamedTuple):
    """A base, and how it is trained and tested."""

    name: str
    config: Any
    backbone: Any
    base: Tensors
    encode: Encode
    length: int  # tokens of a row
    sizes: tuple[int, int, int]  # rows: to train on at most, to choose with, to test
    recipe: Recipe
    folder: Path  # experts and losses are kept here


def real(steps: int, validation: int, test: int) -> Setup:
    """SmolLM2-135M, with rows of 112 tokens."""
    from collab_jax.io.load import load

    model = load(NAME, dtype="float32")
    tokenizer = model.tokenizer
    return Setup(
        NAME,
        model.config,
        model.backbone,
        canonical.to_checkpoint(model.config, model.params),
        lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        112,
        (400, validation, test),
        Recipe(steps, 2, 1e-4, NAME),
        cache() / "experiments" / "merge_tasks",
    )


def toy(folder: Path) -> Setup:
    """A random model over bytes."""
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init, transformer

    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    )
    params = init(jax.random.key(0), config)
    return Setup(
        "toy",
        config,
        transformer(config),
        canonical.to_checkpoint(config, params),
        lambda text: list(text.encode()),
        128,
        (8, 2, 2),
        Recipe(2, 2, 1e-2, "toy"),
        folder,
    )
