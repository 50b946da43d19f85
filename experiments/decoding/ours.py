"""What the decoding benchmark measures of the library."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import decode, law, score, tree
from collab_jax.io.load import Model, load
from collab_jax.lm import LM, language_model
from collab_jax.models import transformer
from collab_jax.models.config import from_hf
from collab_jax.models.packed import KINDS as PACKED
from collab_jax.models.packed import pack, pack_leaf

NAME = "smollm2-135m-instruct"
# a model in bfloat16, not its matrices alone; and one with matrices of int8
WHOLE, SHORT = "bfloat16 throughout", "int8 in bfloat16"
KINDS = "plain", *PACKED, WHOLE, SHORT
# Llama shapes with random weights, and the kinds that fit into 24 GiB together
SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "1b": (
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
        | {"num_hidden_layers": 22, "num_attention_heads": 32}
        | {"num_key_value_heads": 4},
        (*PACKED, WHOLE, SHORT),
    ),
    "8b": (
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
        ("int8",),
    ),
}
TEXT = """The harbour wakes before the town does. At four the first boats come in with
their lamps still lit, and the men who wait on the quay count the crates aloud so that
nobody can say later that there were fewer. By six the market is loud. A woman sells
coffee from a cart, a boy carries ice, and two gulls quarrel over a fish that neither of
them caught. When the sun stands above the lighthouse the prices begin to fall, because
what is not sold by noon will feed the cats. In the afternoon the nets are mended and
the boats painted, and in the evening, when the wind turns, everyone looks at the sky
and says what the weather will be, and everyone says something else."""


class Timing(NamedTuple):
    """One generation."""

    prefill: float  # seconds until the first new token can be computed
    decode: float  # seconds of the new tokens
    tokens: list[list[int]]  # the new ones of every row


class Subject(NamedTuple):
    """A model in all its kinds, and what it reads."""

    lm: LM
    params: dict[str, Any]  # by kind
    prompt: list[int]  # as many tokens as the widest batch of prompts needs
    length: int  # tokens of a prompt
    new: int
    texts: list[list[int]]  # on which the loss by rounding is measured
    model: Model | None  # None for random weights

    def prompts(self, batch: int) -> list[list[int]]:
        """Unlike prompts of one length."""
        return [self.prompt[b : b + self.length] for b in range(batch)]


def real(
    name: str, data: str | None, length: int, new: int, kinds: Sequence[str] = KINDS
) -> Subject:
    """A model of the hub in float32, in the kinds that are asked for."""
    if len(kinds) == 1 and kinds[0] != "plain":  # without plain matrices beside them
        model = load(name, dtype=type_of(kinds[0]), matrices=matrices_of(kinds[0]))
        params = {kinds[0]: model.params}
    else:
        model = load(name, dtype=jnp.float32)
        params = in_kinds(model.params, ("plain", *kinds))
    words = model.tokenizer(TEXT).input_ids
    prompt = (words * (2 * (length + 64) // len(words) + 1))[: length + 64]
    texts = [words] if data is None else _texts(Path(data), model.tokenizer)
    return Subject(model.lm, params, prompt, length, new, texts, model)


def type_of(kind: str) -> Any:
    """The type in which a kind computes."""
    return jnp.bfloat16 if kind in (WHOLE, SHORT) else jnp.float32


def matrices_of(kind: str) -> str:
    """How the matrices of a kind are packed."""
    return {WHOLE: "bfloat16", SHORT: "int8"}.get(kind, kind)


def in_kinds(params: Any, kinds: Sequence[str]) -> dict[str, Any]:
    """Plain parameters in float32, in other kinds as well."""

    def one(kind):
        short = jax.tree.map(lambda leaf: leaf.astype(type_of(kind)), params)
        return pack(short, matrices_of(kind))

    return {kind: params if kind == "plain" else one(kind) for kind in kinds}


def shape(name: str, length: int, new: int, kinds: Sequence[str]) -> Subject:
    """A model of `SHAPES`; a tensor is packed as soon as it is drawn."""
    raw, possible = SHAPES[name]
    config = from_hf({"model_type": "llama", "tie_word_embeddings": False} | raw)
    module = transformer.transformer(config)
    shapes = jax.eval_shape(partial(transformer.init, config=config), jax.random.key(0))
    drawn = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)

    def leaf(path, like, kind):
        names = tree.path_string(path)
        if like.ndim < 2:
            return jnp.ones(like.shape, type_of(kind))
        tensor = np.resize(drawn * like.shape[0] ** -0.5, like.shape)
        tensor = jnp.asarray(tensor, type_of(kind))
        return pack_leaf(names, tensor, matrices_of(kind), False)

    params = {
        kind: jax.tree_util.tree_map_with_path(partial(leaf, kind=kind), shapes)
        for kind in kinds
        if kind in possible
    }
    prompt = np.random.default_rng(1).integers(config.vocab, size=length + 64).tolist()
    return Subject(language_model(module), params, prompt, length, new, [], None)


def toy() -> Subject:
    """A random Llama; bytes are its tokens."""
    raw = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32}
    raw |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = from_hf(raw | {"tie_word_embeddings": True})
    params = transformer.init(jax.random.key(0), config)
    words = list(TEXT.encode())
    lm = language_model(transformer.transformer(config))
    kinds = in_kinds(params, KINDS)
    return Subject(lm, kinds, words[:96], 33, 4, [words[:60]], None)


def _texts(folder: Path, tokenizer: Any) -> list[list[int]]:
    """Worked answers of GSM8K, and the texts that Spec-Bench wants summarised."""
    import json

    found = []
    path = folder / "gsm8k" / "test.jsonl"
    for line in path.read_text("utf-8").splitlines()[:32]:
        row = json.loads(line)
        found.append(f"{row['question']}\n{row['answer']}")
    path = folder / "spec_bench" / "question.jsonl"
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    long = [row["turns"][0] for row in rows if row["category"] == "summarization"]
    return [tokenizer(text).input_ids[:512] for text in found + long[:8]]


def read(params: Any) -> int:
    """Bytes of the parameters that a token reads: of an untied embedding, a row."""
    own = tree.size(params)
    return own - tree.size(params["embed"]) if "head" in params else own


class Ours:
    """Greedy decoding; programs are compiled at the first call of a shape."""

    def __init__(self, subject: Subject, kind: str) -> None:
        """Decodes with the parameters of a kind."""
        self.params = subject.params[kind]
        decoder = decode.greedy(subject.lm, subject.new)

        def rest(params, state):
            return jax.lax.fori_loop(
                0, subject.new, lambda _, state: decoder.step(params, state), state
            )

        self.start = jax.jit(decoder.init)
        self.rest = jax.jit(rest, donate_argnums=1)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Timing:
        """Generates once."""
        prompt, length = decode.pad(prompts)
        begin = time.perf_counter()
        state = self.start(self.params, prompt, length, jax.random.key(0))
        jax.block_until_ready(state.tokens)
        middle = time.perf_counter()
        state = jax.block_until_ready(self.rest(self.params, state))
        end = time.perf_counter()
        tokens = np.asarray(state.tokens)[:, len(prompts[0]) :]
        return Timing(middle - begin, end - middle, tokens.tolist())


class Wide:
    """A call of T tokens behind a prompt, in a loop: what verifying a draft costs."""

    ROUNDS = 16

    def __init__(self, subject: Subject, kind: str) -> None:
        """Reads with the parameters of a kind."""
        self.params, self.lm, self.length = subject.params[kind], subject.lm, 128
        lm = self.lm

        def rounds(params, state, tokens):
            def one(_, carry):
                state, tokens = carry
                out, state = lm.extend(params, state, tokens)
                best = law.best(out.logits)
                return lm.rewind(state, jnp.array([tokens.shape[1]])), best

            return jax.lax.fori_loop(0, self.ROUNDS, one, (state, tokens))[1]

        self.run = jax.jit(rounds)

    def __call__(self, count: int) -> float:
        """Seconds of a call of `count` tokens."""
        state = self.lm.init(self.params, 1, self.length + 32)
        state = state._replace(length=state.length + self.length)
        tokens = jnp.ones((1, count), jnp.int32)
        begin = time.perf_counter()
        jax.block_until_ready(self.run(self.params, state, tokens))
        return (time.perf_counter() - begin) / self.ROUNDS


def losses(subject: Subject) -> dict[str, float]:
    """Nats a token of the texts, by kind of weights."""
    width = max(map(len, subject.texts), default=0)
    run = jax.jit(score.score, static_argnums=(0, 4))
    found = {}
    for kind in subject.params if subject.texts else ():
        total, count = 0.0, 0
        for text in subject.texts:
            row = np.zeros((1, width), np.int32)
            row[0, : len(text)] = text
            scores = run(
                subject.lm, subject.params[kind], row, np.array([len(text)]), 128
            )
            total -= float(np.asarray(scores.logprob)[0, 1 : len(text)].sum())
            count += len(text) - 1
        found[kind] = total / count
    return found
