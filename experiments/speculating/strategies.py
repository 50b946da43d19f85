"""Targets and proposers over one model, by name, for the cross of both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from joining.member import shortened
from speculating.subject import Subject

from collab_jax import combine, pool, warp
from collab_jax.cooperate.efficient import (
    adaptive,
    growth,
    lookahead,
    ngram,
    recycle,
    suffix,
    topology,
)
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.parallel import parallel, parallel_tree
from collab_jax.lm import LM, Features, language_model
from collab_jax.merge import memory, recipes
from collab_jax.models import packed, transformer
from collab_jax.models.parallel_heads import medusa

DRAFTED = 4  # tokens of a draft of a model


class Strategy(NamedTuple):
    """An LM to follow."""

    lm: LM
    params: Any
    rows: Callable[[Any, jax.Array], Any] = lambda params, prompt: params


class Source(NamedTuple):
    """A proposer."""

    proposer: Proposer
    params: Any


def cut(subject: Subject, layers: int) -> tuple[Any, Any]:
    """The first layers with the last norm and the head, as a model: config, params."""
    return shortened(subject.config, subject.params, range(layers))


def noisy(params: Any, seed: int, scale: float) -> Any:
    """Another model of the same shape: every leaf with noise of its own size."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        x + scale * x.std() * jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    )


def packed_each(params: Any) -> Any:
    """The parameters of each model in nested tuples with packed matrices."""
    if isinstance(params, tuple):
        return tuple(packed_each(own) for own in params)
    return packed.pack(params) if isinstance(params, dict) else params


def targets(
    subject: Subject, layers: int, noise: float = 0.05
) -> dict[str, Callable[[], Strategy]]:
    """What is followed. Experts are the model with noise: none of them is a copy."""
    lm, params = subject.lm, subject.params

    def expert(seed: int) -> Any:
        return noisy(params, seed, noise)

    def small() -> tuple[LM, Any]:
        config, own = cut(subject, layers)
        return language_model(transformer.transformer(config)), own

    def merged() -> Any:
        return memory.merge(recipes.ties(0.5), params, [expert(1), expert(2)])

    def penalised() -> Strategy:
        return Strategy(warp.warp(lm, warp.repetition_penalty(1.3)), params)

    def ensemble() -> Strategy:
        pair = combine.product([lm, lm], pool.mixture(0.6, 0.4))
        return Strategy(pair, (params, expert(1)))

    def contrastive() -> Strategy:
        amateur, own = small()
        pair = combine.product([lm, amateur], pool.contrast(0.1, 0.5))
        return Strategy(pair, (params, own))

    def proxy_tuned() -> Strategy:
        tuned, plain = small()[1], noisy(small()[1], 3, noise)
        proxy = combine.stacked(small()[0], 2, pool.linear(1, -1))
        # the small pair on one axis, over the large model
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), tuned, plain)
        return Strategy(combine.product([lm, proxy], pool.linear(1, 1)), (params, both))

    def context_aware() -> Strategy:
        axes = (None, 0, 0)
        aware = combine.stacked(combine.prefixed(lm), 2, pool.linear(1.5, -0.5), axes)
        return Strategy(aware, params, prefixes)

    def deep() -> Strategy:
        """A warped, proxy-tuned ensemble of a merged and a plain model."""
        pair = combine.product([lm, lm], pool.mixture(0.5, 0.5))
        over = combine.product([pair, proxy_tuned().lm], pool.linear(0.5, 0.5))
        inner = (merged(), params), proxy_tuned().params
        return Strategy(warp.warp(over, warp.repetition_penalty(1.1)), inner)

    return {
        "plain": lambda: Strategy(lm, params),
        "penalised": penalised,
        "merged": lambda: Strategy(lm, merged()),
        "ensemble": ensemble,
        "contrastive": contrastive,
        "proxy-tuned": proxy_tuned,
        "context-aware": context_aware,
        "all of these": deep,
    }


def prefixes(params: Any, prompt: jax.Array) -> Any:
    """Parameters of the context-aware target for a batch of prompts.

    The first token of a prompt is the start token, in whose place one member reads
    a context of eight tokens, and the other nothing more.
    """
    batch = prompt.shape[0]
    tokens = jnp.broadcast_to(prompt[:, :8], (2, batch, 8))
    count = jnp.broadcast_to(jnp.array([[8], [1]]), (2, batch))
    return params, tokens, count


def first_of(features: Any) -> Features:
    """Those of the first model in a composite, for heads that know it."""
    while not isinstance(features, Features):
        features = features[0]
    stacked = features.hidden.ndim > 3
    return jax.tree.map(lambda leaf: leaf[0], features) if stacked else features


def sources(subject: Subject, layers: int) -> dict[str, Callable[[], Source]]:
    """What drafts; heads are those before training."""
    size, vocab, params = subject.length, subject.vocab, subject.params

    def free(make: Callable[[], Proposer]) -> Callable[[], Source]:
        return lambda: Source(make(), ())

    def model() -> tuple[LM, Any]:
        config, own = cut(subject, layers)
        return language_model(transformer.transformer(config)), own

    def of_model(make: Callable[[LM], Proposer]) -> Callable[[], Source]:
        def source():
            lm, own = model()
            return Source(make(lm), own)

        return source

    def heads(make: Callable) -> Callable[[], Source]:
        def source():
            made = medusa(subject.backbone(), 3)
            own = made.init(jax.random.key(0), params)
            return Source(make(made), (own, params))

        return source

    paths = topology.grow(2 * size)
    short = [path for path in topology.grow(24) if len(path) <= 3]
    return {
        "prompt lookup": free(lambda: ngram.prompt_lookup(size)),
        "n-gram": free(lambda: ngram.ngram(size)),
        "adaptive n-gram": free(lambda: adaptive.adaptive(size)),
        "suffix": free(lambda: suffix.suffix(size)),
        "recycling": free(lambda: recycle.recycle(size, vocab)),
        "recycling tree": free(lambda: recycle.recycle_tree(paths, vocab)),
        "lookahead": free(lambda: lookahead.lookahead(vocab)),
        "draft model": of_model(
            lambda lm: draft_lm(warp.warp(lm, warp.greedy()), DRAFTED)
        ),
        "tree of a model": of_model(lambda lm: draft_tree(lm, growth.ranked(short))),
        "expanded tree": of_model(
            lambda lm: draft_tree(lm, growth.expanded(3, 4, min(2 * size, 24)))
        ),
        "heads": heads(lambda made: parallel(made, read=first_of)),
        "tree of heads": heads(lambda made: parallel_tree(made, short, read=first_of)),
    }
