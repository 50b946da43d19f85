"""Two models with unequal vocabularies as one: likelihood, choices, and what it costs.

Claim: SmolLM2-135M-Instruct and Gemma-3-270M, joined by the union of their vocabularies
(GaC), of their likeliest tokens (UniTE), by common tokens alone (exact), edit distance
(MinED), aligned embeddings (EVA) or common anchors (DeePEn), need fewer bits a byte of
held-out text than either; PackLLM's weights do better than equal ones; greedy text of
the composite is the same with drafts.
Command: python experiments/cross_vocabulary.py [--smoke] [--data DIR] [--rows N]
[--facts N] [--aligned ROWS] [--anchors N] [--ways NAME ...] [--output FILE] [--fresh];
a run that was stopped is taken up again.
Data: DIR or $COLLAB_JAX_DATA holds gsm8k/test.jsonl, spec_bench/question.jsonl and
true_false/ as for the other experiments. Without it, texts of this project are used.
Hardware: two CPU cores, 10 GiB, 20 minutes (`--smoke`: seconds, random toy models with
tokenizers of their own).
Expected: (November 2026) bits a byte of SmolLM2 1.08, of Gemma 1.29, and 1.43 where it
is spelled token by token, which costs it 11 percent. The union (1.03), common tokens
alone (1.02) and MinED (1.05) need fewer than either with the weight fitted on the other
half; with equal weights only common tokens do by a margin that tells. UniTE (1.23) and
EVA (1.36) need more, as they forbid 51 and 16 of the tokens, and EVA leaves out a
member that the other does not confirm; so does DeePEn with 512 anchors (1.12).
PackLLM's searched weights beat its equal ones (1.08 and 1.16), those by perplexity do
not. No way gets more facts right than Gemma alone (21 of 24; the best 20). Greedy
texts equal with drafts.

Texts stand in SmolLM2's tokens, and Gemma reads each as it is spelled in its own.
Predicted are worked answers of GSM8K behind their questions, and the second halves of
texts of Spec-Bench; bits are divided by the bytes of what is predicted. A law that
gives a token probability 0 (UniTE, EVA) would need infinitely many bits: 1
percent of SmolLM2's own law is mixed into it, and `forbidden` counts such tokens. The
union's law also has mass on tokens that only Gemma has; a text that stands in
SmolLM2's tokens does not get that mass. Facts: which of two countries follows "Oslo is
a city in". Differences are to the better of the two models, paired over texts, with 95
percent around them; facts are compared by McNemar's test; intervals are not corrected
for their number. `fitted` is the weight that is best on the other half of the texts.
PackLLM's weights come from what is given. Gemma alone reads its own tokens.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from joining.data import SAID, Text, facts, held_out
from joining.heldout import ALONE, WEIGHTS, Held, fitted, held, table
from joining.laws import argued, as_target, equal_rows, same_with_drafts, swept
from joining.member import GEMMA, SMOLLM2, Member, real, spoken, toy
from joining.report import (
    Report,
    Verdict,
    conclude,
    decided,
    folder_of,
    opened,
    parser,
    show,
)
from joining.vocabularies import Built, Pair, build, lifted, packed, ways
from measuring.picture import picture

from collab_jax import decode, score, translate, uncertainty
from collab_jax.commands.progress import progress
from collab_jax.ensemble.vocabulary.perplexity import (
    by_perplexity,
    by_search,
    prompt_loss,
)

ROWS = 8  # of a batch
CHUNK = 16  # tokens whose logits exist at a time
PACK = "PackLLM, equal weights", "PackLLM-sim", "PackLLM-opt"

Rows = list[tuple[list[int], list[int]]]  # tokens that are given, and predicted


def questions(known: dict[str, list[tuple[str, str]]], count: int) -> list[Text]:
    """True facts, each twice: with the right country, and with another."""
    rng, found = np.random.default_rng(1), []
    pairs = known["capitals"]
    for place in rng.permutation(len(pairs))[:count]:
        subject, true = pairs[place]
        false = str(rng.choice([c for _, c in pairs if c != true]))
        said = SAID["capitals"][0].format(subject, "").strip()
        found += [Text("facts", said, f" {country}") for country in (true, false)]
    return found


def cut(member: Member, texts: Sequence[Text]) -> Rows:
    """What is given and what is predicted, in a member's tokens."""
    return [
        ([member.start, *member.encode(text.given)], member.encode(text.wanted))
        for text in texts
    ]


def batches(rows: Rows, width: int) -> list[tuple[Any, Any, list[slice]]]:
    """Padded rows, and where the predicted tokens stand in each."""
    found = []
    for place in range(0, len(rows), ROWS):
        some = rows[place : place + ROWS]
        filled = [*some, *some[:1] * (ROWS - len(some))]
        tokens, length = decode.pad([[*a, *b] for a, b in filled], width)
        found.append((tokens, length, [slice(len(a), len(a + b)) for a, b in some]))
    return found


def read(program: Callable[..., jax.Array], rows: Rows, width: int) -> list[list[str]]:
    """Log-probs of the predicted tokens, by knob and row; a row is a line.

    Args:
      program: (batch, tokens, length) -> `[K, B, T]`.
      rows: of tokens.
      width: rows are padded to a multiple of it.
    """
    found: list[list[str]] = []
    with progress("batches", -(-len(rows) // ROWS)) as advance:
        for n, (tokens, length, parts) in enumerate(batches(rows, width)):
            result = np.asarray(program(n, tokens, length), np.float64)
            for b, part in enumerate(parts):
                lines = [knob[b, part].round(4).tolist() for knob in result]
                found.append([" ".join(map(str, line)) for line in lines])
            advance()
    return [list(column) for column in zip(*found, strict=True)]


def alone(member: Member) -> Callable[..., jax.Array]:
    """A program for `read`: a model in its own tokens."""
    lm = member.lm
    run = jax.jit(lambda *given: score.score(lm, *given, chunk=CHUNK).logprob[None])
    return lambda _, tokens, length: run(member.params, tokens, length)


def weights_of(
    pair: Pair, built: Built, texts: Sequence[Text]
) -> tuple[jax.Array, list]:
    """Equal weights, and PackLLM's by perplexity and by search, `[3, N, 2]`."""
    own = [cut(member, texts) for member in (pair.first, pair.second)]
    losses, searched = [], []
    parts = built.across, built.nearest

    def search(params, parts, tokens, length):
        return by_search(lifted(pair, *parts), params, tokens, length, chunk=CHUNK)

    find = jax.jit(search)
    loss = jax.jit(prompt_loss, static_argnums=(0, 4))
    for n, member in enumerate((pair.first, pair.second)):
        some, lm = [], member.lm
        for place in range(0, len(texts), ROWS):
            given = [a for a, _ in own[n][place : place + ROWS]]
            count = len(given)
            tokens, length = decode.pad(given + given[:1] * (ROWS - count), 64)
            found = loss(lm, member.params, tokens, length, CHUNK)
            some += np.asarray(found)[:count].tolist()
            if not n:
                best = find(pair.params, parts, tokens, length)
                searched += np.asarray(best)[:count].tolist()
        losses.append(some)
    both = np.array(losses).T
    found = [np.full_like(both, 0.5), by_perplexity(jnp.asarray(both)), searched]
    return jnp.stack([jnp.asarray(each, jnp.float32) for each in found]), both.tolist()


def measure(
    pair: Pair, built: Built, texts: Sequence[Text], chosen: Any, report: Report
) -> None:
    """Log-probs by every method; what is known is left out."""
    logprob = report.found["logprob"]
    widths = {"held out": 64, "facts": 64 if chosen.smoke else 16}
    sets = {
        "held out": [text for text in texts if text.group != "facts"],
        "facts": [text for text in texts if text.group == "facts"],
    }

    def keep(what: str, names: Sequence[str], make: Callable[[], Any], rows: Rows):
        own = logprob.setdefault(what, {})
        if not all(name in own for name in names):
            own |= dict(zip(names, read(make(), rows, widths[what]), strict=True))
            report.save()

    first, second = pair.first, pair.second
    program = {m.name: alone(m) for m in (first, second)}
    for what, some in sets.items():
        rows = cut(first, some)
        spelt = [
            tuple(translate.spell(built.across, part) for part in row) for row in rows
        ]
        keep(what, ALONE[:1], lambda: program[first.name], rows)
        keep(what, ALONE[1:2], lambda: program[second.name], cut(second, some))
        keep(what, ALONE[2:], lambda: program[second.name], spelt)
    for name, way in ways(pair, built).items():
        if chosen.ways and not name.startswith(tuple(chosen.ways)):
            continue
        print(name, file=sys.stderr)
        sweep = swept(way.make, CHUNK)

        def run(_, tokens, length, way=way, sweep=sweep):
            knobs = jnp.array(WEIGHTS)
            return sweep(knobs, way.parts, pair.params, tokens, length)

        for what, some in sets.items():
            names = [f"{name}, {w:g}" for w in WEIGHTS]
            keep(what, names, lambda run=run: run, cut(first, some))
    if not chosen.ways or "PackLLM".startswith(tuple(chosen.ways)):
        sweep = swept(packed(pair), CHUNK)
        parts = built.across, built.nearest

        def pack():
            weights, losses = weights_of(pair, built, sets["held out"])
            report.found["pack"] = {
                "losses": losses,
                "weights": dict(zip(PACK, weights.round(4).tolist(), strict=True)),
            }
            fill = ((0, 0), (0, -weights.shape[1] % ROWS), (0, 0))
            weights = jnp.pad(weights, fill)

            def run(n, tokens, length):
                own = weights[:, n * ROWS : (n + 1) * ROWS]
                return sweep(own, parts, pair.params, tokens, length)

            return run

        keep("held out", PACK, pack, cut(first, sets["held out"]))


def verdicts(seen: Held, names: Sequence[str], found: dict[str, Any]) -> list[Verdict]:
    """What was expected, and what was seen. Intervals are over texts, or facts."""
    best = min(ALONE[:2], key=seen.a_byte)
    alone_ = ", ".join(f"{name} {seen.a_byte(name):.3f}" for name in ALONE)
    said = []
    for name in names:
        for weight in ("0.5", "fitted"):
            way = f"{name}, {weight}"
            said.append(
                decided(
                    f"{name}, weight {weight}: fewer bits a byte than either model",
                    seen.gap(best, way),
                    f" below {best}; {seen.a_byte(way):.3f}; {alone_}",
                )
            )
    facts_best = max(ALONE[:2], key=lambda name: seen.right[name].sum())
    for name in names:
        pair = seen.right[f"{name}, 0.5"], seen.right[facts_best]
        more, p = int(pair[0].sum()) - int(pair[1].sum()), uncertainty.mcnemar(*pair)
        counts = " and ".join(f"{int(x.sum())} of {len(x)}" for x in pair)
        said.append(
            Verdict(
                f"{name}, weight 0.5: more facts right than {facts_best}",
                f"{counts}, p = {p:.3f} (McNemar)",
                more > 0 and p < 0.05,
            )
        )
    if {"exact", "MinED"} <= {*names}:
        said.append(
            decided(
                "MinED needs fewer bits than common tokens alone, equal weights",
                seen.gap("exact, 0.5", "MinED, 0.5"),
            )
        )
    if set(PACK) <= seen.bits.keys():
        said += [
            decided(f"{name} needs fewer bits than equal weights",
                    seen.gap(PACK[0], name))
            for name in PACK[1:]
        ]  # fmt: skip
    cost = seen.a_byte(ALONE[2]) / seen.a_byte(ALONE[1]) - 1
    said.append(
        Verdict(
            "spelling token by token costs Gemma less than 5 percent of its bits",
            f"{cost:.1%}",
            cost < 0.05,
        )
    )
    for name, target in found["target"].items():
        said.append(
            same_with_drafts(f"greedy text of {name} is the same with drafts", target)
        )
    return said


def draw(lines: Sequence[dict[str, Any]]) -> Any:
    """Bits a byte of every method."""

    def made(pyplot):
        figure, axis = pyplot.subplots(figsize=(8, 0.27 * len(lines) + 1.2))
        colours = [
            "tab:grey" if line["method"] in ALONE else "tab:blue" for line in lines
        ]
        axis.barh(range(len(lines)), [line["all"] for line in lines], color=colours)
        axis.set_yticks(
            range(len(lines)), [line["method"] for line in lines], fontsize=8
        )
        axis.invert_yaxis()
        least = min(line["all"] for line in lines)
        axis.set_xlim(0.9 * least, None)
        axis.set_xlabel("bits a byte of held-out text; behind a name SmolLM2's weight")
        return figure

    return made


def toys() -> Pair:
    """Random models over tokenizers of a few merges."""
    return Pair(*(spoken(toy(n, 1), n) for n in range(2)), {})


def main(arguments: list[str] | None = None) -> int:
    """Measures; 0 where the texts with drafts are the plain ones."""
    parse = parser(__doc__)
    add = parse.add_argument
    add("--rows", type=int, default=6, help="texts of a group")
    add("--facts", type=int, default=24)
    add("--aligned", type=int, default=32768, help="rows of Gemma that EVA aligns")
    add("--anchors", type=int, default=512, help="of DeePEn")
    add("--ways", nargs="+", metavar="NAME", help="these alone, by first words")
    chosen = parse.parse_args(arguments)
    if chosen.smoke:
        pair, chosen.rows, chosen.facts = toys(), 1, 2
        chosen.aligned = chosen.anchors = 40
        chosen.ways = ["union", "EVA", "PackLLM"]
    else:
        twins = {"<|endoftext|>": "<bos>"}
        pair = Pair(real(SMOLLM2), real(GEMMA), twins)
    keys = "rows", "facts", "aligned", "anchors"
    setting = {"models": [pair.first.name, pair.second.name], "weights": [*WEIGHTS]}
    setting |= {key: getattr(chosen, key) for key in keys}
    report = opened("cross_vocabulary", chosen, setting, "built", "logprob", "target")
    found, data = report.found, folder_of(chosen)
    texts = held_out(data, chosen.rows, 240)
    texts += questions(facts(data), chosen.facts)
    built = build(pair, chosen.aligned, chosen.anchors)
    found["built"] = built.seconds | found["built"]  # the first time counts
    found["shared"] = int((built.exact >= 0).sum())
    report.save()
    measure(pair, built, texts, chosen, report)
    joined = 1 if chosen.smoke else 2
    asked = [[pair.first.start, *pair.first.encode(text.given)] for text in texts[:4]]
    for name, way in ways(pair, built).items():
        if name in ("union (GaC)", "UniTE")[:joined] and name not in found["target"]:
            lm = argued(lambda parts, way=way: way.make(0.5, parts), way.parts)
            params, new = (way.parts, pair.params), 4 if chosen.smoke else 12
            found["target"][name] = as_target(lm, params, asked, new)
            report.save()
    seen = held(found, texts)
    names = [n for n in ways(pair, built) if f"{n}, {WEIGHTS[0]:g}" in seen.bits]
    for name in names:
        fitted(seen, name)
    found["table"] = table(seen)
    heads = [k for k in found["table"][0] if k != "method" and "interval" not in k]
    lines = [
        [x["method"], *(x.get(head, "-") for head in heads)] for x in found["table"]
    ]
    show(["bits a byte", *heads], lines)
    seconds = ", ".join(f"{name} {s:g}" for name, s in found["built"].items())
    print(f"seconds to build: {seconds}; {found['shared']} common tokens\n")
    conclude(report, verdicts(seen, names, found))
    picture(report.path, draw(found["table"]))
    return int(any(equal_rows(x) < x["rows"] for x in found["target"].values()))


if __name__ == "__main__":
    sys.exit(main())
