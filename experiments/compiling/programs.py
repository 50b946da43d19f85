"""The programs that are compiled: functions and the shapes of what they read."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from collab_jax import beam, combine, decode, finetune, mesh, pool, tree, warp
from collab_jax.cooperate.efficient import draft_model, draft_tree, exact, growth, ngram
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.lm import language_model
from collab_jax.merge import memory, recipes
from collab_jax.models.config import from_hf
from collab_jax.models.packed import KERNELS, Packed
from collab_jax.models.transformer import init, transformer
from collab_jax.packing import Batch


def llama(
    layers: int, width: int, inner: int, heads: int, kv: int, vocab=128256
) -> Any:
    """A Llama with a head of its own."""
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 131072,
    }
    return from_hf({"model_type": "llama", "tie_word_embeddings": False, **sizes})


SHORT = "8B, 4 layers"  # a program that says every layer takes long to compile
MODELS = {
    SHORT: lambda: llama(4, 4096, 14336, 32, 8),
    "1B": lambda: llama(16, 2048, 8192, 32, 8),
    "8B": lambda: llama(32, 4096, 14336, 32, 8),
    "70B": lambda: llama(80, 8192, 28672, 64, 8),
    "toy": lambda: llama(2, 64, 128, 8, 8, 512),
}
SMALL = {"8B": "1B", "70B": "8B"}  # which helps which; else one of the same kind


class Work(NamedTuple):
    """How much is decoded."""

    model: str
    rows: int = 8
    prompt: int = 2048
    new: int = 256


class Program(NamedTuple):
    """Something to compile."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]  # shapes with shardings
    donated: tuple[int, ...] = ()


class Bench:
    """Shapes over the chips of a target, all of them for one model in parts."""

    def __init__(self, devices: np.ndarray, work: Work, members: int = 1):
        """Lays the chips out as members times parts of a model."""
        grid = devices.reshape(members, -1)
        self.mesh = Mesh(grid, ("member", "model"), axis_types=(AxisType.Auto,) * 2)
        self.work, self.config = work, MODELS[work.model]()
        self.lm = language_model(transformer(self.config))
        self.small = MODELS[SMALL.get(work.model, work.model)]()
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())

    def at(self, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
        """The shape of an array."""
        where = sharding or self.everywhere
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def params(self, config: Any = None, members: int = 0) -> Any:
        """Those of a model in bfloat16, in parts; with an axis of members if any."""
        config = config or self.config
        like = jax.eval_shape(lambda: init(jax.random.key(0), config, jnp.bfloat16))
        rules = mesh.for_model(config, self.mesh, "model")
        if members:
            rules = mesh.stacked(rules, "member")
            like = jax.tree.map(lambda x: self.at((members, *x.shape), x.dtype), like)
        where = mesh.shardings(like, self.mesh, rules)
        return jax.tree.map(lambda x, s: self.at(x.shape, x.dtype, s), like, where)

    def text(self) -> tuple[Any, Any, Any]:
        """Prompts, their lengths, and a key."""
        rows = self.work.rows
        key = jax.eval_shape(lambda: jax.random.key(0))
        return (
            self.at((rows, self.work.prompt), jnp.int32),
            self.at((rows,), jnp.int32),
            self.at((), key.dtype),
        )

    def decoder(self, decoder: Any, params: Any) -> Program:
        """A whole program, prompt and loop."""

        def run(params, prompt, length, key):
            return decode.run(decoder, params, prompt, length, key)

        return Program(run, (params, *self.text()))


def greedy(bench: Bench) -> Program:
    """Plain greedy text."""
    return bench.decoder(decode.greedy(bench.lm, bench.work.new), bench.params())


def sampled(bench: Bench) -> Program:
    """Drawn text, with temperature, the likeliest 50, and a share of 0.9."""
    warps = warp.temperature(0.8), warp.top_k(50), warp.top_p(0.9)
    warped = warp.warp(bench.lm, *warps)
    return bench.decoder(decode.sample(warped, bench.work.new), bench.params())


def int8(bench: Bench) -> Program:
    """Greedy text of matrices of int8."""

    def packed(path, leaf):
        if not re.fullmatch(KERNELS, tree.path_string(path)):
            return leaf
        where = leaf.sharding.spec
        panels = NamedSharding(bench.mesh, PartitionSpec(None, *where))
        scale = NamedSharding(bench.mesh, PartitionSpec(*where[1:]))
        return Packed(
            bench.at((1, *leaf.shape), jnp.int8, panels),
            bench.at(leaf.shape[1:], jnp.float32, scale),
            leaf.shape[1],
            np.dtype(leaf.dtype),
            False,
        )

    params = jax.tree_util.tree_map_with_path(packed, bench.params())
    return bench.decoder(decode.greedy(bench.lm, bench.work.new), params)


def looked_up(bench: Bench) -> Program:
    """Drafts of seven tokens copied from the text."""
    decoder = speculate(
        on_lm(bench.lm), ngram.ngram(7), bench.work.new, verifier=exact.greedy()
    )
    return bench.decoder(decoder, (bench.params(), ()))


def drafted(bench: Bench) -> Program:
    """Drafts of five tokens by a smaller model, block verification."""
    small = language_model(transformer(bench.small))
    decoder = speculate(on_lm(bench.lm), draft_model.draft_lm(small, 5), bench.work.new)
    return bench.decoder(decoder, (bench.params(), bench.params(bench.small)))


def in_a_tree(bench: Bench) -> Program:
    """Trees of seven nodes drafted by a smaller model."""
    small = language_model(transformer(bench.small))
    paths = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
    proposer = draft_tree.draft_tree(small, growth.ranked(paths))
    new, verifier = bench.work.new, exact.greedy()
    decoder = speculate(on_lm(bench.lm), proposer, new, verifier=verifier)
    return bench.decoder(decoder, (bench.params(), bench.params(bench.small)))


def proxy_tuned(bench: Bench) -> Program:
    """The model, moved by two smaller ones, and drafts of one of them: three lines."""
    small = language_model(transformer(bench.small))
    tuned = combine.product([bench.lm, small, small], pool.linear(1, 1, -1))
    decoder = speculate(on_lm(tuned), draft_model.draft_lm(small, 5), bench.work.new)
    one, other = bench.params(), bench.params(bench.small)
    return bench.decoder(decoder, ((one, other, other), other))


def ensemble(bench: Bench) -> Program:
    """Four models of one shape as one, on an axis of their own."""
    joined = combine.stacked(bench.lm, 4, pool.mixture(0.25, 0.25, 0.25, 0.25))
    decoder = decode.greedy(joined, bench.work.new)
    return bench.decoder(decoder, bench.params(members=4))


def beams(bench: Bench) -> Program:
    """Beam search with four beams a row."""
    return bench.decoder(beam.search(bench.lm, bench.work.new, 4), bench.params())


def ties(bench: Bench) -> Program:
    """TIES of two experts and their base, of which half is kept."""

    def run(base, *experts):
        return memory.merge(recipes.ties(0.5), base, experts)

    return Program(run, (bench.params(),) * 3)


def step(bench: Bench) -> Program:
    """A step of AdamW on all parameters, layers computed again."""
    backbone = transformer(bench.config)
    tuner = finetune.finetuner(backbone, optax.adamw(1e-5), remat=True)
    params = bench.params()
    where = jax.tree.map(lambda x: x.sharding, params)
    state = jax.eval_shape(tuner.init, params)
    form = jax.tree.structure(params)

    def laid_out(node):
        """The moments lie as the parameters do, whatever else there is everywhere."""
        if jax.tree.structure(node) == form:
            return jax.tree.map(lambda x, s: bench.at(x.shape, x.dtype, s), node, where)
        return bench.at(node.shape, node.dtype)

    state = jax.tree.map(
        laid_out, state, is_leaf=lambda node: jax.tree.structure(node) == form
    )
    shape = bench.work.rows, bench.work.prompt
    batch = Batch(bench.at(shape, jnp.int32), bench.at(shape, jnp.float32))

    def run(state, batch):
        return tuner.step((), state, batch)

    return Program(run, (state, batch), donated=(0,))


PROGRAMS: dict[str, Callable[[Bench], Program]] = {
    "greedy": greedy,
    "sampled": sampled,
    "int8": int8,
    "prompt lookup": looked_up,
    "drafted": drafted,
    "drafted tree": in_a_tree,
    "proxy-tuned, drafted": proxy_tuned,
    "ensemble of 4": ensemble,
    "4 beams": beams,
    "merge, TIES of 2": ties,
    "step of AdamW": step,
}
MEMBERS = {"ensemble of 4": 4}  # programs whose members have chips of their own
# what is compiled for a few layers of 8B
LAYERED = "drafted tree", "merge, TIES of 2", "step of AdamW"
