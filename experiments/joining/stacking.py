"""N models of one shape as one decode: its time, its tokens, and its program."""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from joining.report import Verdict
from speculating.same import differences, margins
from speculating.strategies import noisy
from speculating.subject import Subject, texts

from collab_jax import combine, decode
from collab_jax.commands.progress import progress
from collab_jax.pool import mixture

BAR = 1.05  # times N
NOISE = 0.05
HOST = r"callback|infeed|outfeed|stablehlo\.(?:send|recv)"  # what leaves the device


def program_of(text: str) -> dict[str, Any]:
    """What a lowered program does beside arithmetic.

    Args:
      text: StableHLO.

    Returns:
      How many while loops it has, and what it sends to the host or gets from there.
    """
    loops = len(re.findall(r"stablehlo\.while", text))
    return {"loops": loops, "host": sorted(set(re.findall(HOST, text)))}


def stacks(
    subject: Subject,
    held: Callable[[Any], Any],
    sizes: Sequence[int],
    new: int,
    repeats: int,
    known: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Seconds of one model and of N stacked ones, in turn, in one process.

    Args:
      subject: the model; the others are the model with noise.
      held: the parameters of a model as they are decoded with.
      sizes: N.
      new: new tokens.
      repeats: of both.
      known: what was found, by N.
      save: called after each.
    """
    params = subject.params
    left = [n for n in sizes if str(n) not in known]
    words = next(iter(subject.prompts.values()))[0]
    prompt, length = decode.pad([words])
    key = jax.random.key(0)
    with progress("stacked", len(left) * repeats) as advance:
        for count in left:
            copies = [noisy(params, seed, NOISE) for seed in range(1, count)]
            copies = [held(copy) for copy in (params, *copies)]
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies)
            loop = combine.product([subject.lm] * count, mixture())
            members = {
                "one": (subject.lm, copies[0]),
                "stacked": (combine.stacked(subject.lm, count, mixture()), stack),
                "loop": (loop, tuple(copies)),
            }
            runs, lowered, found = {}, {}, {}
            for name, (lm, own) in members.items():
                decoder = decode.greedy(lm, new)
                program = decode.compile(lambda _, decoder=decoder: decoder)
                given = None, own, prompt, length, key
                runs[name] = lambda program=program, given=given: jax.block_until_ready(
                    program(*given)
                )
                text = program.lower(*given).as_text()
                lowered[name] = program_of(text)
                (found[name],) = texts(runs[name](), 1)  # compiled before
            apart = differences(
                [0],
                [words],
                [found["stacked"]],
                [found["loop"]],
                margins(loop, tuple(copies)),
            )
            seconds: dict[str, list[float]] = {"one": [], "stacked": []}
            for number in range(repeats):
                for name in [*seconds][:: -1 if number % 2 else 1]:
                    begin = time.perf_counter()
                    runs[name]()
                    seconds[name].append(round(time.perf_counter() - begin, 5))
                advance()
            known[str(count)] = {
                "seconds": seconds,
                "tokens": len(found["loop"]),
                "apart": apart,
                "program": lowered,
            }
            save()
            del copies, stack, members, runs


def ratios(known: dict[str, Any]) -> dict[str, float]:
    """Seconds of N stacked models over N times those of one, medians."""
    return {
        count: statistics.median(line["seconds"]["stacked"])
        / (int(count) * statistics.median(line["seconds"]["one"]))
        for count, line in known.items()
    }


def verdicts(known: dict[str, Any]) -> list[Verdict]:
    """Whether the bars were met."""
    said = []
    for count, ratio in ratios(known).items():
        line = known[count]
        pairs = zip(*line["seconds"].values(), strict=True)
        each = [many / (int(count) * one) for one, many in pairs]
        one, many = (line["program"][name] for name in ("one", "stacked"))
        said += [
            Verdict(
                f"{count} stacked models take at most {BAR} x {count} times one",
                f"{ratio:.2f} x {count}; the runs {min(each):.2f} to {max(each):.2f}",
                ratio <= BAR,
            ),
            Verdict(
                f"{count} stacked models say what the loop over members says",
                f"{line['tokens']} tokens, apart: {line['apart'] or 'none'}",
                all(gap["tie"] for gap in line["apart"]),
            ),
            Verdict(
                f"{count} stacked models have the loops of one, and never ask the host",
                f"{many['loops']} and {one['loops']} loops (the prompt's and the "
                f"text's), host: {many['host'] or 'nothing'}",
                many["loops"] == one["loops"] and not many["host"],
            ),
        ]
    return said
