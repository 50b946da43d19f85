"""Speculative decoding on the command line: what drafts, and how it is verified."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from collab_jax.commands.opening import Opened
    from collab_jax.cooperate.efficient.draft import Proposer
    from collab_jax.cooperate.efficient.verify import Verifier
    from collab_jax.decoder import Decoder
    from collab_jax.lm import LM
    from collab_jax.translate import Bridge

TEXT = "ngram", "adaptive", "suffix"  # draft from the text itself, without a model
VERIFIERS = "block", "maximal", "gumbel", "typical"
LENGTH = 5  # tokens of a draft, unless told
ROOM = 2.0  # slots of a drafting model for each token of a target of another tokenizer

draft = click.option(
    "--draft",
    metavar="SOURCE2",
    help="Decode speculatively: a smaller model drafts, of the same tokenizer or of "
    f"another, or the text itself does: {', '.join(TEXT)}. The text stays the same, in "
    "law.",
)
draft_length = click.option(
    "--draft-length",
    type=click.IntRange(min=1),
    metavar="K",
    help=f"Tokens drafted in a round, at most.  [default: {LENGTH}]",
)
verify = click.option(
    "--verify",
    type=click.Choice(VERIFIERS),
    help="How drafts of samples are verified: gumbel gives the very text of plain "
    "sampling with the seed, typical is lossy.  [default: block]",
)


class Drafter(NamedTuple):
    """What drafts in a run."""

    name: str
    length: int  # K
    verify: str
    opened: "Opened | None"  # None: no model
    longest: int = 0  # tokens of a text, at most
    bridge: "Bridge | None" = None  # to the tokens of a model of another tokenizer

    def read_as(self, lm: "LM") -> "LM":
        """The drafting LM in the tokens of its target."""
        if self.bridge is None:
            return lm
        from collab_jax.translate import translate

        return translate(lm, self.bridge, ROOM)

    def decoder(
        self,
        lm: "LM",
        drafting: "LM | None",
        max_new_tokens: int,
        greedy: bool,
        **ends: Any,
    ) -> "Decoder":
        """The speculative decoder of an LM; both LMs are warped already."""
        from collab_jax.cooperate.efficient import exact
        from collab_jax.cooperate.efficient.speculate import speculate
        from collab_jax.cooperate.efficient.target import on_lm

        return speculate(
            on_lm(lm, widths=self._widths()),
            self._proposer(drafting, greedy),
            max_new_tokens,
            verifier=exact.greedy() if greedy else self._verifier(),
            **ends,
        )

    def _widths(self) -> tuple[int, ...]:
        """Rounds of a draft from the text, which often has none; a model always has."""
        if self.opened is not None:
            return ()
        return (1,) if self.length < 6 else (1, 1 + self.length // 2)

    def _proposer(self, lm: "LM | None", greedy: bool) -> "Proposer":
        from collab_jax.cooperate.efficient import adaptive, ngram, suffix
        from collab_jax.cooperate.efficient.draft_model import draft_lm

        if lm is not None:
            return draft_lm(lm, self.length, greedy=greedy)
        slots = 1 << max(13, self.longest.bit_length())
        known: tuple[Callable[[int], Proposer], ...] = (
            ngram.ngram,
            lambda length: adaptive.adaptive(length, slots=slots),
            suffix.suffix,
        )
        return dict(zip(TEXT, known, strict=True))[self.name](self.length)

    def _verifier(self) -> "Verifier":
        from collab_jax.cooperate.efficient import coupled, verify

        known = verify.block, verify.maximal, coupled.gumbel, verify.typical
        return dict(zip(VERIFIERS, known, strict=True))[self.verify]()


def check_flags(
    draft: str | None,
    length: int | None,
    verify: str | None,
    beams: int,
    greedy: bool = False,
) -> None:
    """Refuses flags that say nothing without a draft, or contradict it.

    Raises:
      click.UsageError: naming the flag.

    >>> check_flags(None, None, None, 4)
    >>> check_flags(None, 5, None, 1)
    Traceback (most recent call last):
    click.exceptions.UsageError: --draft-length goes with --draft
    """
    given = {"--draft-length": length, "--verify": verify}
    for flag, value in given.items():
        if draft is None and value is not None:
            raise click.UsageError(f"{flag} goes with --draft")
    if verify is not None and greedy:
        raise click.UsageError(
            "--verify goes with sampling, as --temperature 0.8; greedy text is "
            "verified by equality"
        )
    if draft is not None and beams > 1:
        raise click.UsageError("--draft goes without --beams")


def open_drafter(
    draft: str,
    length: int | None,
    verify: str | None,
    target: "Opened",
    dtype: str,
    **reading: Any,
) -> Drafter:
    """What drafts for a model; its parameters are not read yet.

    Args:
      draft: one of `TEXT`, or the source of a model.
      length: tokens of a draft; None for the default.
      verify: one of `VERIFIERS`; None for the default.
      target: the model that is drafted for.
      dtype: of the drafting model's parameters.
      **reading: `chat`, `system` and `matrices` of `open_source`.

    Raises:
      FileNotFoundError: where there is no such model.
      ValueError: for a model of another tokenizer that shares no token.

    >>> from types import SimpleNamespace
    >>> target = SimpleNamespace(config=SimpleNamespace(context=2048))
    >>> open_drafter("ngram", None, None, target, "float32").length
    5
    """
    drafter = Drafter(
        draft, length or LENGTH, verify or VERIFIERS[0], None, target.config.context
    )
    if draft in TEXT:
        return drafter
    from collab_jax.commands.opening import open_source

    opened = open_source(draft, dtype, **reading)
    bridge = None if opened.same_tokens(target) else _bridge(draft, opened, target)
    return drafter._replace(opened=opened, bridge=bridge)


def _bridge(source: str, drafter: "Opened", target: "Opened") -> "Bridge":
    """How the target's tokens are spelled in the draft's; says how many are shared."""
    try:
        found = drafter.bridge_from(target)
    except ValueError as error:
        raise ValueError(
            f"{source} cannot draft for a model of another tokenizer: {error}; ngram, "
            "adaptive and suffix need no tokenizer"
        ) from error
    click.echo(
        f"{source} has another tokenizer; of the target's {target.config.vocab} tokens "
        f"it drafts the {int(found.shared().sum())} that both have",
        err=True,
    )
    return found


def told(records: Sequence[dict[str, Any]]) -> str:
    """What the drafts were worth, for people.

    Args:
      records: with "tokens", "calls", "drafted" and "accepted".

    >>> told([{"tokens": [1] * 6, "calls": 2, "drafted": 8, "accepted": 4}])
    '3.00 tokens a call of the model, 50% of the drafted tokens accepted'
    """
    tokens = sum(len(record["tokens"]) for record in records)
    calls, drafted, accepted = (
        sum(record[name] for record in records)
        for name in ("calls", "drafted", "accepted")
    )
    return (
        f"{tokens / max(calls, 1):.2f} tokens a call of the model, "
        f"{accepted / max(drafted, 1):.0%} of the drafted tokens accepted"
    )
