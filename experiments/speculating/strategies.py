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
    cascade,
    growth,
    lookahead,
    ngram,
    recycle,
    stopping,
    suffix,
    topology,
)
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.draft_tree import draft_tree
from collab_jax.cooperate.efficient.early_exit import Begun, early_exit, upper
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.parallel import parallel, parallel_tree
from collab_jax.cooperate.efficient.target import Target, on_lm
from collab_jax.lm import LM, Features, language_model
from collab_jax.merge import memory, recipes
from collab_jax.models import packed, transformer
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.parallel_heads import blockwise, medusa

DRAFTED = 4  # tokens of a draft of a model
EARLY = "early exit"  # follows targets made with `in_halves`, and no context-aware one


class Large(NamedTuple):
    """The large model in a target: itself, or what goes on from its first layers."""

    lm: LM
    hold: Callable[[Any], Any] = lambda params: params


class Strategy(NamedTuple):
    """An LM to follow."""

    lm: LM
    params: Any
    own: Any  # parameters of the large model in it
    rows: Callable[[Any, jax.Array], Any] = lambda params, prompt: params


class Source(NamedTuple):
    """A proposer."""

    proposer: Proposer
    params: Any  # None: those of the large model
    target: Callable[[LM], Target] = on_lm  # how an LM is followed


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

    def is_model(node):
        return isinstance(node, dict)

    return jax.tree.map(
        lambda node: packed.pack(node) if is_model(node) else node,
        params,
        is_leaf=is_model,
    )


def in_halves(subject: Subject, layers: int) -> Large:
    """The model that goes on from the hidden states of its first layers."""
    tap, count = f"hidden.{layers}", subject.config.layers
    first = subject.backbone((tap,), (0, layers))
    last = subject.backbone((), (layers, count))
    return Large(upper(first, last, tap), lambda params: (params, Begun()))


def targets(
    subject: Subject, layers: int, noise: float = 0.05, large: Large | None = None
) -> dict[str, Callable[[], Strategy]]:
    """What is followed. Experts are the model with noise: none of them is a copy.

    Args:
      subject: the model.
      layers: of small models, its first ones.
      noise: size of the noise, as a share of a leaf's own.
      large: what stands for the model itself; the other members are whole.
    """
    lm, params = subject.lm, subject.params
    first = large or Large(lm)

    def expert(seed: int) -> Any:
        return noisy(params, seed, noise)

    def small() -> tuple[LM, Any]:
        config, own = cut(subject, layers)
        return language_model(transformer.transformer(config)), own

    def merged() -> Any:
        return memory.merge(recipes.ties(0.5), params, [expert(1), expert(2)])

    def alone(own: Any, *warps: Any) -> Strategy:
        return Strategy(warp.warp(first.lm, *warps), first.hold(own), own)

    def over(other: LM, own: Any, pooled: Any) -> Strategy:
        pair = combine.product([first.lm, other], pooled)
        return Strategy(pair, (first.hold(params), own), params)

    def proxy() -> tuple[LM, Any]:
        """A small model and one with noise, on one axis."""
        model, tuned = small()
        plain = noisy(tuned, 3, noise)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), tuned, plain)
        return combine.stacked(model, 2, pool.linear(1, -1)), both

    def context_aware() -> Strategy:
        axes = (None, 0, 0)
        aware = combine.stacked(combine.prefixed(lm), 2, pool.linear(1.5, -0.5), axes)
        return Strategy(aware, params, params, prefixes)

    def deep() -> Strategy:
        """A warped, proxy-tuned ensemble of a merged and a plain model."""
        pair = combine.product([first.lm, lm], pool.mixture(0.5, 0.5))
        model, own = proxy()
        tuned = combine.product([lm, model], pool.linear(1, 1))
        both = combine.product([pair, tuned], pool.linear(0.5, 0.5))
        joined = merged()
        inner = (first.hold(joined), params), (params, own)
        return Strategy(warp.warp(both, warp.repetition_penalty(1.1)), inner, joined)

    return {
        "plain": lambda: alone(params),
        "penalised": lambda: alone(params, warp.repetition_penalty(1.3)),
        "merged": lambda: alone(merged()),
        "ensemble": lambda: over(lm, expert(1), pool.mixture(0.6, 0.4)),
        "contrastive": lambda: over(*small(), pool.contrast(0.1, 0.5)),
        "cascade": lambda: over(*small(), cascade.optimal(0.3)),
        "proxy-tuned": lambda: over(*proxy(), pool.linear(1, 1)),
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

    def over(made: Any, make: Callable) -> Callable[[], Source]:
        """What reads features of the large model, with fresh parameters."""

        def source():
            own = made.init(jax.random.key(0), params)
            return Source(make(made), (own, params))

        return source

    def features(grow: growth.Growth) -> Callable[[], Source]:
        backbone = subject.backbone()
        return over(
            extrapolator(subject.config),
            lambda layer: feature_drafter(backbone, layer, grow, read=first_of),
        )

    def early() -> Source:
        tap = f"hidden.{layers}"
        first = language_model(subject.backbone((tap,), (0, layers)))
        own = draft_lm(first, DRAFTED, greedy=True, whole=True)
        return Source(own, None, lambda lm: early_exit(lm, tap))

    def unsure() -> Source:
        """A draft model that stops where it is not sure."""
        lm, own = model()
        rule = stopping.confidence(0.4)
        draft = draft_lm(lm, DRAFTED, greedy=True, stopping=rule)
        return Source(draft, (own, ()))

    def chained(made: Any) -> Proposer:
        return parallel(made, read=first_of)

    three = medusa(subject.backbone(), 3)
    nodes = 2 * size  # of a tree: more show nothing else, and each costs a row
    paths = topology.grow(nodes)
    short = [path for path in paths if len(path) <= 3]
    return {
        "prompt lookup": free(lambda: ngram.prompt_lookup(size)),
        "n-gram": free(lambda: ngram.ngram(size)),
        "adaptive n-gram": free(lambda: adaptive.adaptive(size)),
        "suffix": free(lambda: suffix.suffix(size)),
        "recycling": free(lambda: recycle.recycle(size, vocab)),
        "recycling tree": free(lambda: recycle.recycle_tree(paths, vocab)),
        "lookahead": free(lambda: lookahead.lookahead(vocab, 3, 3, 3)),
        "draft model": of_model(lambda lm: draft_lm(lm, DRAFTED, greedy=True)),
        "unsure model": unsure,
        "tree of a model": of_model(lambda lm: draft_tree(lm, growth.ranked(short))),
        "expanded tree": of_model(
            lambda lm: draft_tree(lm, growth.expanded(3, 4, nodes))
        ),
        "heads": over(three, chained),
        "tree of heads": over(
            three, lambda made: parallel_tree(made, short, read=first_of)
        ),
        "blockwise heads": over(
            blockwise(subject.backbone(), 3, subject.config.width), chained
        ),
        "features": features(growth.chain(3)),
        "tree of features": features(growth.expanded(3, 4, nodes)),
        EARLY: early,
    }
