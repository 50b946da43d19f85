"""How long bridges between two vocabularies take to build, and how much memory.

`python -m joining.bridging KIND CACHE` builds one in a process of its own and prints
what it took; what is kept on disk is kept in the folder CACHE.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from joining.member import GEMMA, SMOLLM2, spoken, toy
from joining.report import Verdict
from measuring.process import peak

from collab_jax.ensemble.vocabulary.alignment import align, exact_pairs
from collab_jax.ensemble.vocabulary.edit_distance import complete
from collab_jax.io import hub, load, safetensors
from collab_jax.io.bridge import bridge
from collab_jax.io.tokenizer import load_tokenizer, token_bytes
from collab_jax.io.union import unite

QUICK = "exact", "union", "MinED"
SLOW = "EVA"
KEPT = "MinED", "EVA"  # on disk
LIMIT = {**dict.fromkeys(QUICK, 60.0), SLOW: 600.0}  # seconds
MEMORY = 2 * 2**30  # bytes of a process, for the quick ones


class Side(NamedTuple):
    """One of the two vocabularies."""

    tokenizer: Any
    size: int  # rows of the model
    rows: Callable[[], np.ndarray]  # its output embedding


def real() -> tuple[Side, Side]:
    """SmolLM2's and Gemma's; the heads of both are tied."""

    def side(name: str) -> Side:
        folder = hub.fetch(name)
        file = safetensors.open_file(folder / "model.safetensors")
        return Side(
            load_tokenizer(folder),
            load.read_config(folder).vocab,
            lambda: np.asarray(file.read("model.embed_tokens.weight"), np.float32),
        )

    return side(SMOLLM2), side(GEMMA)


def toys() -> tuple[Side, Side]:
    """Tokenizers of a few merges."""

    def side(seed: int) -> Side:
        member = spoken(toy(seed, 1), seed)
        rows = np.asarray(member.params["embed"]["embedding"])
        return Side(member.tokenizer, member.config.vocab, lambda: rows)

    return side(0), side(1)


def maker(kind: str, pair: tuple[Side, Side]) -> Callable[[], Any]:
    """What builds a bridge from the first's tokens to the second's, all read before."""
    first, second = pair
    unknown = [
        side.tokenizer("?", add_special_tokens=False).input_ids[0] for side in pair
    ]
    twins = {"<|endoftext|>": "<bos>"}
    if "<bos>" not in second.tokenizer.get_vocab():
        twins = {}

    def exact():
        return bridge(
            first.tokenizer,
            second.tokenizer,
            vocab=first.size,
            member_vocab=second.size,
            twins=twins,
            fallback=unknown[1],
        )

    def union():
        sizes = first.size, second.size
        both = first.tokenizer, second.tokenizer
        return unite(*both, vocabs=sizes, twins=twins, fallbacks=unknown).bridges

    def texts(side: Side) -> list[bytes]:
        found = token_bytes(side.tokenizer)[: side.size]
        return [*found, *[b""] * (side.size - len(found))]

    def edited():
        across = exact()
        known = np.asarray(jnp.where(across.shared(), across.spelling[:, 0], -1))
        return complete(known, texts(first), texts(second), keep=True)

    rows = [side.rows() for side in pair] if kind == SLOW else []

    def embedded():
        return align(rows[1], rows[0], exact_pairs(exact()), keep=True)

    return {"exact": exact, "union": union, "MinED": edited, "EVA": embedded}[kind]


def took(kind: str, pair: tuple[Side, Side], folder: Path) -> dict[str, Any]:
    """Builds one here.

    Args:
      kind: of `LIMIT`.
      pair: the vocabularies.
      folder: the cache for what is kept.

    Returns:
      Seconds, bytes of the process at most so far, and whether it was in the cache.
    """
    make = maker(kind, pair)

    def there() -> set[tuple[str, int]]:
        found = (folder / "bridges").glob("*.npz")
        return {(path.name, path.stat().st_mtime_ns) for path in found}

    before = there()
    with mock.patch.dict(os.environ, COLLAB_JAX_CACHE=str(folder)):
        begin = time.perf_counter()
        jax.block_until_ready(make())
        seconds = round(time.perf_counter() - begin, 3)
    found = {"seconds": seconds, "peak": peak()}
    return found | {"cached": bool(before) and there() == before}


def bridges(
    kinds: tuple[str, ...], smoke: bool, known: dict[str, Any], save: Callable
) -> None:
    """Builds what is missing, twice where it is kept.

    Args:
      kinds: of `LIMIT`.
      smoke: in this process, from toys.
      known: what each took, the first time and again.
      save: called after each.
    """
    pair = toys() if smoke else None
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    around = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for kind in (kind for kind in kinds if kind not in known):
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(1 + (kind in KEPT)):
                if pair is not None:
                    runs.append(took(kind, pair, Path(folder)))
                    continue
                print(f"a bridge is built: {kind}", file=sys.stderr)
                again = [sys.executable, "-m", "joining.bridging", kind, folder]
                done = subprocess.run(
                    again, check=True, stdout=subprocess.PIPE, text=True, env=around
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        known[kind] = runs
        save()


def verdicts(known: dict[str, list[dict[str, Any]]]) -> list[Verdict]:
    """Whether the bars were met."""
    said = []
    for kind, (first, *again) in known.items():
        quick = kind in QUICK
        size = first["peak"] / 2**30
        said.append(
            Verdict(
                f"{kind} is built in under {LIMIT[kind]:g} s"
                + (" and 2 GiB" if quick else ""),
                f"{first['seconds']:.1f} s, {size:.2f} GiB",
                first["seconds"] < LIMIT[kind]
                and (not quick or first["peak"] < MEMORY),
            )
        )
        said += [
            Verdict(
                f"{kind} comes from the cache the second time",
                f"{second['seconds']:.1f} s",
                second["cached"],
            )
            for second in again
        ]
    return said


if __name__ == "__main__":
    print(json.dumps(took(sys.argv[1], real(), Path(sys.argv[2]))))
