"""What the numbers of a comparison mean for a merge, in sentences with thresholds.

The thresholds are rules of thumb: each stands in its sentence, so that a reader can
judge it.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from collab_jax.merge.inspect.compare import Bad
from collab_jax.merge.inspect.diagnose import LARGE, TOP
from collab_jax.merge.inspect.tally import Row, between

FAR = 0.5  # |delta| / |base| above which a model is hardly a fine-tune of the base
ORTHOGONAL, ALIKE = 0.1, 0.5  # |cosine|
UNEQUAL = 2.0  # longest delta over the shortest
SPARSE = 0.5  # share of entries that changed
MANY = 0.01  # share of changed entries above LARGE
LOW = 0.1  # effective rank as a share of the smaller side


def verdict(
    total: Row,
    names: Sequence[str],
    base: str,
    bad: Sequence[Bad] = (),
    findings: Sequence[str] = (),
) -> list[str]:
    """What follows for a merge.

    Args:
      total: of the whole model.
      names: of the N experts.
      base: what the deltas are taken from.
      bad: numbers that are not finite; model 0 is the base.
      findings: of `collab_jax.merge.inspect.correspond` and `collab_jax.io.compatible`.

    >>> import numpy as np
    >>> from collab_jax.merge.inspect import diagnose
    >>> from collab_jax.merge.inspect.compare import Compared
    >>> from collab_jax.merge.inspect.tally import row
    >>> a = np.ones(100)
    >>> found = Compared("a", (100,), diagnose.sums(a, [a], [0]), None, (), (True,))
    >>> verdict(row("all", [found]), ["B"], "A")
    ['B equals A in every tensor that was compared: merging it changes nothing.']
    """
    found = total.statistics
    moved = [n for n in range(len(names)) if found.norm[n] > 0]
    lines = [
        *_bad(bad, [base, *names]),
        *_equal(total, names, base, moved),
        *_distance(total, names, base, moved),
        *_lengths(total, names, moved),
        *_directions(total, names, moved),
        *_signs(total, names, moved),
        *_sizes(total, names, moved),
        *_share(total, names, moved),
        *_ranks(total, names, moved),
        *_findings(findings),
    ]
    return lines


def _bad(bad: Sequence[Bad], models: Sequence[str]) -> Iterable[str]:
    for n in sorted({b.model for b in bad}):
        own = [b for b in bad if b.model == n]
        more = f" and in {len(own) - 1} more tensors" if len(own) > 1 else ""
        yield (
            f"{models[n]} holds {sum(b.entries for b in own)} numbers that are not "
            f"finite, the first {own[0].value} in {own[0].name} at "
            f"{list(own[0].at)}{more}: a merge refuses it; leave it out or repair it. "
            "Here these entries count as zero."
        )


def _equal(total: Row, names, base, moved) -> Iterable[str]:
    for n, name in enumerate(names):
        if n not in moved:
            yield (
                f"{name} equals {base} in every tensor that was compared: merging it "
                "changes nothing."
            )


def _distance(total: Row, names, base, moved) -> Iterable[str]:
    if not moved:
        return
    found = total.statistics
    said = _each([names[n] for n in moved], [found.relative[n] for n in moved])
    far = [n for n in moved if found.relative[n] > FAR]
    line = f"{said} away from {base}, in parts of its norm"
    if far:
        who = _list([names[n] for n in far])
        yield (
            f"{line}. Above {FAR:.0%} ({who}), models hardly come from one start, and "
            "averages of their weights tend to fail: check the base."
        )
    else:
        yield f"{line}: below {FAR:.0%}, as fine-tunes of one base are."


def _lengths(total: Row, names, moved) -> Iterable[str]:
    norms = total.statistics.norm
    if len(moved) < 2:
        return
    long, short = max(moved, key=lambda n: norms[n]), min(moved, key=lambda n: norms[n])
    ratio = norms[long] / norms[short]
    if ratio > UNEQUAL:
        yield (
            f"The delta of {names[long]} is {ratio:.1f} times as long as that of "
            f"{names[short]} (above {UNEQUAL:g}): with equal weights {names[long]} "
            "decides; weigh it down, or take weights that follow from norms (MetaGPT)."
        )


def _directions(total: Row, names, moved) -> Iterable[str]:
    if len(moved) < 2:
        return
    cosine = total.statistics.cosine
    pairs = [(i, j) for k, i in enumerate(moved) for j in moved[:k]]
    values = [cosine[p] for p in pairs]
    if len(pairs) == 1:
        said = f"The cosine of the deltas is {values[0]:.2f}"
    else:
        said = f"The cosines of the deltas are {min(values):.2f} to {max(values):.2f}"
    if max(map(abs, values)) < ORTHOGONAL:
        yield (
            f"{said}, within {ORTHOGONAL:g} of zero: nearly orthogonal; sums (task "
            "arithmetic) and soups interfere little."
        )
        return
    if min(values) < -ORTHOGONAL:
        i, j = pairs[int(np.argmin(values))]
        yield (
            f"{said}. {names[j]} and {names[i]} point against each other (below "
            f"-{ORTHOGONAL:g}): a sum undoes part of both."
        )
    elif min(values) > ALIKE:
        yield (
            f"{said}, above {ALIKE:g}: the experts moved the same way; average them, a "
            "plain sum goes too far."
        )
    else:
        yield (
            f"{said}: the experts share a direction in part (above {ORTHOGONAL:g}); "
            "a sum counts it again and again, so keep lambda below 1 or average."
        )


def _signs(total: Row, names, moved) -> Iterable[str]:
    found = total.statistics
    if len(moved) < 2 or math.isnan(found.conflict):
        return
    counted = float(between(found.pair_conflict).mean())
    weighted = float(between(found.pair_weighted).mean())
    line = (
        f"Signs disagree in {counted:.0%} of the entries that two changed, "
        f"{weighted:.0%} by magnitude (independent: 50%); a plain sum cancels "
        f"{found.cancelled:.0%} of the magnitude"
    )
    gain = float(between(found.overlap / found.chance).mean())
    if weighted > 0.4 and gain > 1.5:
        yield (
            f"{line}. The largest {TOP:.0%} overlap {gain:.1f} times as much as chance "
            "(above 1.5) and conflict (above 40%): the experts quarrel over the same "
            "entries; elect signs (TIES)."
        )
    elif weighted < 0.2:
        yield f"{line}. Below 20% there is little for an election of signs to do."
    else:
        yield (
            f"{line}. The largest {TOP:.0%} overlap {gain:.1f} times as much as chance."
        )


def _sizes(total: Row, names, moved) -> Iterable[str]:
    found = total.statistics
    many = [n for n in moved if found.large[n] > MANY]
    if many:
        said = _each([names[n] for n in many], [found.large[n] for n in many], "has")
        yield (
            f"{said} of the changed entries beyond {LARGE:g} (above {MANY:.0%}): "
            "dropping at random (DARE) is known to work for smaller deltas only (arXiv "
            "2311.03099); keep its density high, or trim by magnitude."
        )


def _share(total: Row, names, moved) -> Iterable[str]:
    found = total.statistics
    few = [n for n in moved if found.changed[n] < SPARSE]
    if few:
        said = _each(
            [names[n] for n in few], [found.changed[n] for n in few], "changed"
        )
        yield (
            f"{said} of the entries (below {SPARSE:.0%}): a density above that trims "
            "nothing. Frozen parts or steps too small for the stored type leave zeros."
        )


def _ranks(total: Row, names, moved) -> Iterable[str]:
    if total.ranks is None:
        return
    shares = total.ranks[0]
    low = [n for n in moved if shares[n] < LOW]
    if low:
        said = _each([names[n] for n in low], [shares[n] for n in low], "use")
        yield (
            f"{said} of the directions that their matrices have (effective rank, below "
            f"{LOW:.0%}), as adapters do: spectral merges (TSV-M, Iso-C) fit."
        )


def _findings(findings: Sequence[str]) -> Iterable[str]:
    wrong = [line for line in findings if line.startswith("wrong")]
    if any("tokenizer: {source: union}" in line for line in wrong):
        yield (
            "The vocabularies differ: set tokenizer: {source: union}, or {source: "
            "base} to keep that of the base."
        )
    others = [x for x in wrong if "tokenizer: {source: union}" not in x]
    if others:
        keys = dict.fromkeys(line.split(":")[1].strip() for line in others)
        yield (
            f"A plain merge would be wrong: the models differ in {_list(list(keys))} "
            "(see the findings)."
        )


def _list(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _each(names: Sequence[str], shares: Sequence[float], verb: str = "is") -> str:
    plural = {"is": "are", "has": "have"}.get(verb, verb)
    said = [f"{share:.2%}" if share < 0.1 else f"{share:.0%}" for share in shares]
    return f"{_list(names)} {verb if len(names) == 1 else plural} {_list(said)}"
