"""Peak memory of a long prefill: eight prompts of 1,500 tokens, Gemma-3-270M, float32.

Claim: loading the model, consuming 8 x 1,500 tokens and eight greedy steps stay under
6 GiB of process memory on the CPU: logits are computed for the last position alone (all
of them would take 12.6 GB), the tied head is the embedding itself, and the cache is
written in place.
Command: python experiments/prefill_memory.py [--smoke] [--output FILE]
Hardware: two CPU cores, 6 GiB; two minutes (`--smoke`: seconds, a random toy model).
Expected: under 6 GiB, measured by the kernel (ru_maxrss) in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 6 * 2**30  # bytes
ROWS, TOKENS, NEW = 8, 1500, 8


def peak() -> int:
    """Bytes of this process at most, so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(smoke: bool) -> dict:
    """Everything in this process: imports, loading, prefill and a few steps."""
    import jax
    import numpy as np

    from collab_jax import decode
    from collab_jax.io.load import load
    from collab_jax.lm import language_model, padded, piece
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init, transformer

    after_imports = peak()
    if smoke:
        config = from_hf(
            {
                "model_type": "llama",
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            }
        )
        model, params = (
            language_model(transformer(config)),
            init(jax.random.key(0), config),
        )
    else:
        loaded = load("gemma-3-270m")
        config, model, params = loaded.config, loaded.lm, loaded.params
    jax.block_until_ready(params)
    after_loading = peak()
    tokens = 150 if smoke else TOKENS
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, config.vocab, (ROWS, tokens)).tolist()
    run = decode.compile(lambda _: decode.greedy(model, NEW))
    began = time.perf_counter()
    result = run(None, params, *decode.pad(prompts), jax.random.key(0))
    length = np.asarray(result.length).tolist()
    seconds = time.perf_counter() - began
    assert length == [tokens + NEW] * ROWS, length
    slots = max(tokens + NEW, padded(tokens - 1, piece(None, ROWS)))
    return {
        "jax": jax.__version__,
        "rows": ROWS,
        "prompt_tokens": tokens,
        "new_tokens": NEW,
        "params_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "cache_bytes": 8
        * ROWS
        * slots
        * config.layers
        * config.kv_heads
        * config.head_size,
        "peak_after_imports": after_imports,
        "peak_after_loading": after_loading,
        "peak": peak(),
        "seconds_with_compilation": round(seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures in a fresh process; 0 where the peak is under the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "prefill_memory.json"
    parser.add_argument("--smoke", action="store_true", help="a toy model, seconds")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--here", action="store_true", help="measure this process")
    chosen = parser.parse_args(arguments)
    if chosen.here:
        print(json.dumps(measure(chosen.smoke)))
        return 0
    again = [sys.executable, __file__, "--here", *["--smoke"][: chosen.smoke]]
    lines = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(lines.splitlines()[-1]) | {"limit": LIMIT}
    for name, value in found.items():
        size = (
            f"{value / 2**30:8.2f} GiB"
            if isinstance(value, int) and value > 2**20
            else f"{value:>8}"
        )
        print(f"{name:26} {size}")
    path = chosen.output or (Path("memory_smoke.json") if chosen.smoke else default)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)
    return 0 if found["peak"] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
