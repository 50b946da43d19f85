"""Several models as one on the command line, from their sources to an LM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from collab_jax.commands.drafting import ROOM
from collab_jax.commands.joining import BRIDGES, PLAUSIBLE, STRENGTH

if TYPE_CHECKING:
    import jax

    from collab_jax.commands.drafting import Drafter
    from collab_jax.commands.opening import Opened
    from collab_jax.io.load import Model
    from collab_jax.io.union import Union
    from collab_jax.lm import LM
    from collab_jax.pool import Pool
    from collab_jax.respond import Codec, Own
    from collab_jax.translate import Bridge


class Join(NamedTuple):
    """How models speak as one; the parameters of none is read yet."""

    kind: str  # "ensemble", "contrast", "proxy" or "context"
    names: tuple[str, ...]
    opened: tuple["Opened", ...]  # the first writes the text
    own: bool  # whether every member reads a prompt of its own
    pool: "Pool"
    context: str | None = None
    weights: tuple[float, ...] = ()
    bridge: str | None = None  # None: one vocabulary
    bridges: tuple["Bridge", ...] = ()  # from the text's tokens to each member's
    union: "Union | None" = None  # whose tokens the text's are, in place of the first's

    def told(self) -> dict[str, Any]:
        """What of it decides the text."""
        return {
            "join": self.kind,
            "members": [
                [name, opened.fingerprint()]
                for name, opened in zip(self.names, self.opened, strict=True)
            ],
            "weights": self.weights,
            "bridge": self.bridge,
            "context": self.context,
        }

    def codec(self) -> "Codec":
        """Of the text."""
        first, union = self.opened[0].codec, self.union
        if union is None:
            return first
        return first._replace(decode=union.text, spelling=lambda: union.tokens)

    def prompts(self) -> tuple["Codec", ...]:
        """What encodes the prompt of each member."""
        if self.context is None:
            return tuple(opened.codec for opened in self.opened)
        codec, before = self.opened[0].codec, f"{self.context}\n\n"
        inside = codec._replace(
            encode=lambda texts: codec.encode([before + text for text in texts])
        )
        return inside, codec

    def members(self) -> list["Opened"]:
        """The models with what encodes their prompts."""
        models = self.opened * len(self.prompts()) if self.context else self.opened
        pairs = zip(models, self.prompts(), strict=True)
        return [opened._replace(codec=codec) for opened, codec in pairs]

    def rooms(self) -> list[float]:
        """Slots of each member for a token of the text."""
        return [ROOM if self.bridges else 1.0] * len(self.prompts())

    def lm(self, models: Sequence["Model"]) -> "LM":
        """The LM of the models, whose parameters are those of `params`."""
        from collab_jax.combine import prefixed, product
        from collab_jax.cooperate.transfer.context import contextual

        if self.context is not None:
            return contextual(models[0].lm, self.pool)
        members = [prefixed(m.lm) if self.own else m.lm for m in models]
        if self.bridge is None:
            return product(members, self.pool)
        return _bridged(self, members, models)

    def params(self, models: Sequence["Model"]) -> Any:
        """The parameters, where prompts are still to be placed."""
        if self.context is not None:
            return models[0].params
        return tuple(model.params for model in models)

    def place(
        self, params: Any, prompts: Sequence[tuple["jax.Array", "jax.Array"]]
    ) -> Any:
        """The parameters with the prompts of a batch."""
        import jax.numpy as jnp

        if self.context is not None:
            tokens, length = zip(*prompts, strict=True)
            return params, jnp.stack(tokens), jnp.stack(length)
        return tuple((p, *own) for p, own in zip(params, prompts, strict=True))


def check_drafter(join: Join, drafter: "Drafter") -> None:
    """Refuses a drafting model that does not write in the tokens of the text.

    Raises:
      ValueError: naming it.

    >>> from types import SimpleNamespace
    >>> check_drafter(SimpleNamespace(union=None), SimpleNamespace(opened=None))
    """
    if join.union is not None and drafter.opened is not None:
        raise ValueError(
            f"--draft {drafter.name} writes in the tokens of {join.names[0]}, and the "
            f"text stands in those of a union: give --bridge {'|'.join(BRIDGES[2:])}, "
            "or --draft ngram"
        )


def own(join: Join, drafter: "Drafter | None") -> "Own":
    """How the members, and a model that drafts for them, read prompts of their own.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(codec=SimpleNamespace(encode=str.split))
    >>> join = Join("contrast", ("a", "b"), (model, model), True, None)
    >>> own(join, None).place(("p", "q"), [("t", "n"), ("u", "m")])
    (('p', 't', 'n'), ('q', 'u', 'm'))
    """
    import numpy as np

    from collab_jax.respond import Own

    encoders = [codec.encode for codec in join.prompts()]
    count, bridges = len(encoders), [*join.bridges]
    if drafter is not None and drafter.opened is not None:
        encoders.append(drafter.opened.codec.encode)
        bridges += [] if drafter.bridge is None else [drafter.bridge]

    def place(params, prompts):
        if drafter is None:
            return join.place(params, prompts)
        main, small = params
        placed = (small, *prompts[count]) if len(prompts) > count else small
        return join.place(main, prompts[:count]), placed

    # every member reads the start token as the last of its prompt: as one token
    start = 0
    if bridges:
        alone = np.all([np.asarray(bridge.size) == 1 for bridge in bridges], axis=0)
        start = int(np.flatnonzero(alone)[0])
    return Own(tuple(encoders), place, start)


def open_join(
    kind: str,
    names: Sequence[str],
    opened: Sequence["Opened"],
    texts: Sequence[str],
    *,
    weights: Sequence[float] = (),
    bridge: str | None = None,
    strength: float | None = None,
    context: str | None = None,
) -> Join:
    """How the models speak as one, checked before their parameters are read.

    Args:
      kind: of `check_flags`.
      names: sources of the models, the base or first member first.
      opened: the models; one for a context.
      texts: the prompts.
      weights: of an ensemble.
      bridge: one of `BRIDGES`, for an ensemble of different tokenizers.
      strength: of the others; None for their papers'.
      context: what stands before every prompt.

    Raises:
      ValueError: for models of different tokenizers that need one.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(codec=None)
    >>> open_join("context", ["a"], [model], ["why?"], context="because").own
    True
    """
    from collab_jax.pool import mixture

    strange = [
        name
        for name, other in zip(names[1:], opened[1:], strict=True)
        if not other.same_tokens(opened[0])
    ]
    if strange and kind != "ensemble":
        raise ValueError(
            f"{strange[0]} has another tokenizer than {names[0]}: --{kind} adds the "
            "laws of models of one tokenizer; --ensemble joins different ones"
        )
    pool = mixture(*weights)
    if kind != "ensemble":
        pool = _pool(kind, STRENGTH[kind] if strength is None else strength)
    join = Join(kind, tuple(names), tuple(opened), False, pool, context, tuple(weights))
    if strange:
        join = _over(join._replace(bridge=bridge or BRIDGES[0]))
    if kind == "context" or strange:
        return join._replace(own=True)
    read = [codec.encode(texts) for codec in join.prompts()]
    return join._replace(own=any(each != read[0] for each in read))


def _pool(kind: str, strength: float) -> "Pool":
    from collab_jax import pool
    from collab_jax.cooperate.transfer import context, offset

    if kind == "contrast":
        return pool.contrast(PLAUSIBLE, strength)
    return {"proxy": offset.proxy_tuning, "context": context.cad}[kind](strength)


def _over(join: Join) -> Join:
    """The join with its bridges."""
    from collab_jax.io.tokenizer import load_tokenizer
    from collab_jax.io.union import unite

    first, opened = join.opened[0], join.opened
    if join.bridge not in BRIDGES[:2]:
        return join._replace(bridges=tuple(each.bridge_from(first) for each in opened))
    tokenizers = [load_tokenizer(each.path) for each in opened]
    found = unite(
        *tokenizers,
        vocabs=[each.config.vocab for each in opened],
        fallbacks=[0 if t.unk_token_id is None else t.unk_token_id for t in tokenizers],
    )
    sizes = ", ".join(str(each.config.vocab) for each in opened)
    click.echo(
        f"vocabularies of {sizes} tokens; together {len(found.tokens)}", err=True
    )
    return join._replace(bridges=found.bridges, union=found)


def _bridged(join: Join, members: list["LM"], models: Sequence["Model"]) -> "LM":
    """The members as one, over different vocabularies."""
    from collab_jax.combine import product
    from collab_jax.ensemble.vocabulary import top_union, union
    from collab_jax.translate import translate

    bridges, weights = join.bridges, join.weights
    if join.bridge == "union":
        return union.union(members, bridges, *weights)
    if join.bridge == "unite":
        return top_union.top_union(members, bridges, *weights)
    if join.bridge == "eva":
        return _by_embeddings(members, bridges, weights, models)
    if join.bridge == "deepen":
        return _by_relations(members, bridges, weights, models)
    if join.bridge == "mined":
        others = _borrowing(join, members, bridges)
    else:
        pairs = zip(members[1:], bridges[1:], strict=True)
        others = [translate(lm, found) for lm, found in pairs]
    return product([members[0], *others], join.pool)


def _borrowing(
    join: Join, members: Sequence["LM"], bridges: Sequence["Bridge"]
) -> list["LM"]:
    """Members that give a token which they lack the logit of the nearest spelling."""
    import jax.numpy as jnp
    import numpy as np

    from collab_jax.ensemble.vocabulary.edit_distance import complete
    from collab_jax.ensemble.vocabulary.lift import borrow
    from collab_jax.translate import spelled
    from collab_jax.warp import warp

    def texts(opened: "Opened") -> list[bytes]:
        assert opened.codec.spelling is not None
        rows = [*opened.codec.spelling()][: opened.config.vocab]
        return rows + [b""] * (opened.config.vocab - len(rows))

    made = []
    ours = texts(join.opened[0])
    for lm, found, opened in zip(
        members[1:], bridges[1:], join.opened[1:], strict=True
    ):
        known = np.where(found.shared(), np.asarray(found.spelling)[:, 0], -1)
        index = jnp.asarray(complete(known, ours, texts(opened), keep=True))
        made.append(warp(spelled(lm, found), borrow(index, opened.config.vocab)))
    return made


def _by_embeddings(members, bridges, weights, models: Sequence["Model"]) -> "LM":
    import numpy as np

    from collab_jax.ensemble.vocabulary.alignment import align, exact_pairs
    from collab_jax.ensemble.vocabulary.eva import eva
    from collab_jax.models.draft_vocabulary import output_matrix

    rows = [np.asarray(output_matrix(m.backbone, m.params)).T for m in models]
    found = [
        align(own, rows[0], exact_pairs(bridge), keep=True)
        for own, bridge in zip(rows[1:], bridges[1:], strict=True)
    ]
    return eva(members, bridges, [None, *found], *weights)


def _by_relations(members, bridges, weights, models: Sequence["Model"]) -> "LM":
    import jax.numpy as jnp

    from collab_jax.ensemble.vocabulary import relative

    anchors = relative.common_tokens(bridges)
    spaces = []
    for model, column, bridge in zip(models, anchors.T, bridges, strict=True):
        tokens = jnp.arange(bridge.pivot.shape[0])[None]
        rows = model.backbone.embed(model.params, tokens)[0]
        spaces.append(relative.relative(rows.astype(jnp.float32), column))
    share = [weight / sum(weights) for weight in weights]
    return relative.deepen_lm(members, bridges, spaces, *share)
