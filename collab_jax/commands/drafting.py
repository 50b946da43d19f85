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

TEXT = "ngram", "adaptive", "suffix"  # draft from the text itself, without a model
VERIFIERS = "block", "maximal", "gumbel", "typical"
LENGTH = 5  # tokens of a draft, unless told

draft = click.option(
    "--draft",
    metavar="SOURCE2",
    help="Decode speculatively: a smaller model with the same tokenizer drafts, or the "
    f"text itself does: {', '.join(TEXT)}. The text stays the same, in law.",
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
            on_lm(lm),
            self._proposer(drafting),
            max_new_tokens,
            verifier=exact.greedy() if greedy else self._verifier(),
            **ends,
        )

    def _proposer(self, lm: "LM | None") -> "Proposer":
        from collab_jax.cooperate.efficient import adaptive, ngram, suffix
        from collab_jax.cooperate.efficient.draft_model import draft_lm

        if lm is not None:
            return draft_lm(lm, self.length)
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
    draft: str, length: int | None, verify: str | None, target: "Opened", dtype: str
) -> Drafter:
    """What drafts for a model; its parameters are not read yet.

    Args:
      draft: one of `TEXT`, or the source of a model.
      length: tokens of a draft; None for the default.
      verify: one of `VERIFIERS`; None for the default.
      target: the model that is drafted for.
      dtype: of the drafting model's parameters.

    Raises:
      FileNotFoundError: where there is no such model.
      ValueError: for a model of another tokenizer.

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

    opened = open_source(draft, dtype)
    _check_tokens(draft, opened, target)
    return drafter._replace(opened=opened)


def _check_tokens(source: str, drafter: "Opened", target: "Opened") -> None:
    """Refuses a draft that counts other tokens than its target."""
    cure = "a draft needs its target's tokenizer; ngram, adaptive and suffix need none"
    if drafter.config.vocab != target.config.vocab:
        raise ValueError(
            f"{source} has {drafter.config.vocab} tokens and its target "
            f"{target.config.vocab}: {cure}"
        )
    assert drafter.codec.spelling is not None
    assert target.codec.spelling is not None
    own, wanted = drafter.codec.spelling(), target.codec.spelling()
    for token, (a, b) in enumerate(zip(own, wanted, strict=False)):
        if a != b:
            raise ValueError(
                f"token {token} of {source} is {a!r} and its target's {b!r}: {cure}"
            )


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
