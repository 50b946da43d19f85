"""The models that the experiments on laws join: two real ones, and toys over bytes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from collab_jax.io.load import load
from collab_jax.lm import LM, Backbone, language_model
from collab_jax.models import config as configs
from collab_jax.models import transformer

SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
BYTES = 256  # of a toy; the token behind them begins a text


class Member(NamedTuple):
    """A model with its own way to cut a text."""

    name: str
    params: Any
    config: configs.Config
    encode: Callable[[str], list[int]]  # without a token in front
    decode: Callable[[Sequence[int]], str]
    start: int  # what stands before a text
    tokenizer: Any = None

    @property
    def backbone(self) -> Backbone:
        """One level below."""
        return transformer.transformer(self.config)

    @property
    def lm(self) -> LM:
        """The model."""
        return language_model(self.backbone)

    def chat(self, text: str) -> list[int]:
        """What a user says, up to where the model answers."""
        if self.tokenizer is None:
            return self.encode(text)
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )


def real(name: str) -> Member:
    """A model in float32."""
    model = load(name, dtype="float32")
    read = model.tokenizer
    starts = {SMOLLM2: "<|endoftext|>", GEMMA: "<bos>"}
    return Member(
        name,
        model.params,
        model.config,
        lambda text: read(text, add_special_tokens=False).input_ids,
        lambda ids: read.decode(ids, skip_special_tokens=True),
        read.convert_tokens_to_ids(starts[name]),
        read,
    )


def toy(seed: int = 0, layers: int = 2) -> Member:
    """A random Llama; bytes are its tokens."""
    raw = {"model_type": "llama", "vocab_size": BYTES + 1, "hidden_size": 32}
    raw |= {"intermediate_size": 48, "num_attention_heads": 4}
    config = configs.from_hf(raw | {"num_hidden_layers": layers})
    return Member(
        f"toy {seed}",
        transformer.init(jax.random.key(seed), config),
        config,
        lambda text: list(text.encode()),
        lambda ids: bytes(i for i in ids if i < BYTES).decode(errors="replace"),
        BYTES,
    )


def shortened(
    config: configs.Config, params: Any, layers: Sequence[int]
) -> tuple[configs.Config, Any]:
    """Some of the layers with the last norm and the head, as a model.

    Args:
      config: of the model.
      params: its tree.
      layers: which ones, in their order.
    """
    per_layer = {
        name: tuple(getattr(config, name)[i] for i in layers)
        for name in ("rotary", "windows", "sparse")
    }
    kept = {k: v for k, v in params.items() if not k.startswith("layers_")}
    kept |= {f"layers_{n}": params[f"layers_{i}"] for n, i in enumerate(layers)}
    return dataclasses.replace(config, layers=len(layers), **per_layer), kept


def spoken(member: Member, merges: int) -> Member:
    """A toy with a tokenizer: bytes, a start token, and two longer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    longer = [("o", "n"), ("t", "h"), ("e", "r")][merges:][:2]
    words = [*letters, *(a + b for a, b in longer)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, longer))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    config = dataclasses.replace(member.config, vocab=len(words) + 1)
    return member._replace(
        params=transformer.init(jax.random.key(merges), config),
        config=config,
        encode=lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        start=len(words),
        tokenizer=tokenizer,
    )
