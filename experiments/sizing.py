"""What fits where, and how fast it can be at most: arithmetic for large models.

Claim: none about time; these are bounds. Memory is exact arithmetic on the shapes of
the models. A token cannot be faster than its bytes over the bandwidth of the memory,
nor a merge; with `--fraction F` the bound is divided by the share of the bandwidth that
a measurement reached (`bench_decode.py` reports it for the machine that it ran on).
Command: python experiments/sizing.py [--smoke] [--fraction F] [--batch B] [--length T]
[--experts N] [--weights KIND ...] [--output FILE]
Hardware: any, no model is read; a second.
Expected: the tables of experiments/README.md.

Bytes a token: all weights, and the keys and values of every row. Bytes of a merge of N
experts with a base in memory: N + 1 models read, one written. Devices share a model by
`mesh.for_model`, so that each holds its part of weights and cache; where it has fewer
heads of keys and values than there are devices, each holds its share of the heads.
Sending between devices is left out: it is two sums of [B, W] a layer.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from measuring.atomic import write_json

RESULTS = Path(__file__).parent / "results" / "sizing.json"
SPARE = 0.9  # share of a device's memory that weights and cache may take


class Shape(NamedTuple):
    """A decoder, as its config.json says."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    def parameters(self) -> int:
        """All numbers, with a head of its own."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + 2 * self.vocab * self.width + self.width

    def cache(self, devices: int = 1) -> float:
        """Bytes a token of keys and values in bfloat16, on each device."""
        heads = max(self.kv_heads / devices, 1)
        return 2 * 2 * self.layers * heads * self.head


class Device(NamedTuple):
    """One chip, as its maker says."""

    memory: float  # GB
    bandwidth: float  # GB/s
    products: float  # bfloat16 TFLOP/s, dense


MODELS = {
    "Llama 3.1 8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama 3.1 70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "Llama 3.1 405B": Shape(126, 16384, 53248, 128, 8, 128, 128256),
}
DEVICES = {
    "TPU v5e": Device(16, 819, 197),
    "TPU v5p": Device(95, 2765, 459),
    "TPU v6e": Device(32, 1640, 918),
    "A100 80 GB": Device(80, 2039, 312),
    "H100 SXM": Device(80, 3350, 989),
    "H200": Device(141, 4800, 989),
}
SLICES = (
    *(("TPU v5e", n) for n in (1, 8, 16)),
    *(("TPU v5p", n) for n in (4, 16)),
    *(("TPU v6e", n) for n in (8, 32)),
    *(("A100 80 GB", n) for n in (1, 8)),
    *(("H100 SXM", n) for n in (1, 8, 16)),
    *(("H200", n) for n in (1, 8)),
)
BYTES = {"bfloat16": 2, "int8": 1}


def row(
    model: str, device: str, count: int, kind: str, options: argparse.Namespace
) -> dict:
    """One model on one slice."""
    shape, chip = MODELS[model], DEVICES[device]
    weights = shape.parameters() * BYTES[kind] / count
    cache = shape.cache(count) * options.batch * options.length
    # half of the text is read by a token on average while it is written
    read = weights + cache / 2
    speed = chip.bandwidth * 1e9 * options.fraction
    flops = 2 * shape.parameters() * options.batch / count / (chip.products * 1e12)
    merge = (options.experts + 2) * shape.parameters() * 2 / count  # held, and moved
    return {
        "model": model,
        "slice": f"{count} x {device}",
        "weights": kind,
        "GB a device": (weights + cache) / 1e9,
        "fits": weights + cache <= SPARE * chip.memory * 1e9,
        "ms a token": 1e3 * max(read / speed, flops),
        "tokens a second": options.batch / max(read / speed, flops),
        "bound by": "memory" if read / speed >= flops else "products",
        "merge fits": merge <= SPARE * chip.memory * 1e9,
        "merge ms": 1e3 * merge / speed,
    }


def cell(fits: bool, value: float, digits: int = 1) -> str:
    """A number, or a dash where the model does not fit."""
    return f"{value:.{digits}f}" if fits else "-"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--weights", nargs="+", choices=BYTES, default=[*BYTES])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction {options.fraction}: a number in (0, 1] is expected")
    for name in ("batch", "length", "experts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1 is expected")
    rows = [
        row(model, device, count, kind, options)
        for model in MODELS
        for device, count in SLICES
        for kind in options.weights
    ]
    print(
        f"{options.batch} rows of {options.length} tokens; {options.experts} experts "
        f"and a base in bfloat16; {options.fraction:.0%} of the bandwidth\n"
    )
    print(
        "| model | slice | weights | GB a device | ms a token | tokens/s | merge, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for x in rows:
        if not x["fits"] and not (x["merge fits"] and x["weights"] == "bfloat16"):
            continue
        merges = x["merge fits"] and x["weights"] == "bfloat16"
        cells = (
            x["model"],
            x["slice"],
            x["weights"],
            f"{x['GB a device']:.1f}",
            cell(x["fits"], x["ms a token"], 2),
            cell(x["fits"], x["tokens a second"], 0),
            cell(merges, x["merge ms"]),
        )
        print(f"| {' | '.join(cells)} |")
    facts = {"fraction": options.fraction, "batch": options.batch}
    facts |= {"length": options.length, "experts": options.experts}
    write_json(options.output, {**facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
