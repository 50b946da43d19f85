"""One program over several processes: decode, score, merge, tune, save and restore.

Claim: two processes of `jax.distributed`, each with half of the devices, give the same
tokens, bit for bit the same merged parameters and checkpoints, and losses within 1e-5
of one process with all of them; the script that does so runs unchanged on a TPU pod.
Command: python experiments/multihost.py [--smoke] [--model NAME] [--devices D]
[--tensor M] [--output FILE]: here, first one process, then two.
On a pod, on every host: python experiments/multihost.py --worker [--model NAME]
[--tensor M] [--output FILE] [--shared FOLDER], where the hosts find each other; else
with --coordinator HOST:PORT --processes N --process I too. FOLDER is seen by all hosts.
Hardware: two CPU cores, 10 GiB, SmolLM2-135M; half an hour while the machine was busy
(`--smoke`: half a minute, a random toy model and half of the parts).
Expected: (November 2026) tokens and bytes are equal, scores apart by at most 6e-6 of
themselves, losses by 4e-7.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring.atomic import write_json

RESULTS = Path(__file__).parent / "results" / "multihost.json"
NAME = "smollm2-135m-instruct"  # with nine heads, three of them of keys and values
NEW, ROWS = 16, 8
TEXTS = [
    "The capital of France is",
    "One, two, three, four,",
    "Water boils at",
    "a b c a b c a b",
    "My name is",
    "In the beginning",
    "def add(x, y):",
    "The opposite of hot is",
]
TOY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LOSS = 1e-5  # how far losses of sums in another order may lie apart, relative


def subject(options: argparse.Namespace, devices: Any):
    """(config, parameters on all devices, prompts)."""
    import jax

    from collab_jax import mesh
    from collab_jax.io.hub import fetch
    from collab_jax.io.load import load, read_config
    from collab_jax.io.tokenizer import encode
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init

    if options.smoke:
        config = from_hf(TOY)
        rules = mesh.for_model(config, devices, "model")
        key = jax.random.key(0)
        like = jax.eval_shape(lambda: init(key, config))
        where = mesh.shardings(like, devices, rules)
        made = jax.jit(lambda: init(key, config), out_shardings=where)()
        return config, made, [[*text.encode()] for text in TEXTS]
    folder = fetch(options.model)
    config = read_config(folder)
    rules = mesh.for_model(config, devices, "model")
    model = load(folder, dtype="float32", sharding=mesh.placer(devices, rules))
    return config, model.params, encode(model.tokenizer, TEXTS)


def whole(array: Any):
    """An array of all processes, as NumPy in each."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def digest(tree: Any) -> str:
    """A hash of all bytes of a tree, one leaf in memory at a time."""
    import jax

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(whole(leaf).tobytes())
    return found.hexdigest()


def work(options: argparse.Namespace) -> dict:
    """All parts, in this process together with the others."""
    import jax
    import jax.numpy as jnp
    import optax

    from collab_jax import beam, combine, decode, finetune, mesh, pool, score, warp
    from collab_jax.cooperate.efficient import exact, ngram
    from collab_jax.cooperate.efficient.speculate import speculate
    from collab_jax.cooperate.efficient.target import on_lm
    from collab_jax.io.checkpoint import load_checkpoint, save_checkpoint
    from collab_jax.lm import language_model
    from collab_jax.merge import recipes
    from collab_jax.merge.memory import merge
    from collab_jax.models.transformer import transformer
    from collab_jax.packing import Batch

    devices = mesh.make_mesh(data=-1, model=options.tensor)
    config, params, prompts = subject(options, devices)
    lm, rows = language_model(transformer(config)), mesh.rows(devices, "data")
    text = mesh.place(
        (*decode.pad(prompts), jax.random.split(jax.random.key(1), ROWS)), rows
    )
    found: dict[str, Any] = {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "platform": jax.devices()[0].device_kind,
        "mesh": dict(devices.shape),
        "parts": {},
    }

    def note(name: str, run: Any) -> None:
        began = time.perf_counter()
        answer = run()
        seconds = round(time.perf_counter() - began, 2)
        found["parts"][name] = {"answer": answer, "seconds": seconds}
        if jax.process_index() == 0:
            print(f"{name}: {seconds} s", flush=True)

    def written(decoder: Any, own: Any) -> list:
        def run(params, prompt, length, keys):
            return decode.run(decoder, params, prompt, length, keys)

        result = jax.jit(mesh.by_rows(run, devices, "data"))(own, *text)
        tokens, length = whole(result.tokens), whole(result.length)
        return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]

    @jax.jit
    def varied(params, seed):
        """Parameters beside the model's, each leaf laid out as it was."""
        leaves, form = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return form.unflatten(
            x + 0.01 * jax.random.normal(key, x.shape, x.dtype)
            for x, key in zip(leaves, keys, strict=True)
        )

    experts = [varied(params, seed) for seed in (1, 2)]
    warped = warp.warp(lm, warp.temperature(0.8), warp.top_k(20))
    both = combine.product([lm, lm], pool.mixture(0.5, 0.5))
    drafted = speculate(on_lm(lm), ngram.ngram(4), NEW, verifier=exact.greedy())
    tokens, length, _ = text
    scored = jax.jit(score.score, static_argnums=0)
    key = jax.random.key(7)
    note("sampled", lambda: written(decode.sample(warped, NEW), params))
    note("beams", lambda: written(beam.search(lm, NEW, 2), params))
    note("ties", lambda: digest(merge(recipes.ties(0.4), params, experts)))
    if not options.smoke:
        note("greedy", lambda: written(decode.greedy(lm, NEW), params))
        note("ensemble", lambda: written(decode.greedy(both, NEW), tuple(experts)))
        note("drafts", lambda: written(drafted, (params, ())))
        note("scores", lambda: whole(scored(lm, params, *text[:2]).logprob).tolist())
        dare = recipes.dare(0.5)
        note("dare", lambda: digest(merge(dare, params, experts, key=key)))

    experts.clear()  # what is trained needs the room
    tuner = finetune.finetuner(transformer(config), optax.sgd(1e-3))
    weights = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.float32)

    def tuned() -> list[float]:
        state, losses = tuner.init(params), []
        step = jax.jit(tuner.step)
        for _ in range(2):
            state, info = step((), state, Batch(tokens, weights))
            losses.append(float(whole(info.loss)))
        return losses

    note("losses", tuned)

    def restored() -> str:
        folder = Path(options.shared) / "checkpoint"
        save_checkpoint(folder, params)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            params,
        )
        return digest(load_checkpoint(folder, like))

    if options.shared:
        note("checkpoint", restored)
        found["intact"] = found["parts"]["checkpoint"]["answer"] == digest(params)
    return found


def worker(options: argparse.Namespace) -> int:
    """One of the processes."""
    import jax

    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes == 0:
        jax.distributed.initialize()  # a pod, or another cluster that jax knows
    elif options.processes > 1:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process
        )
    found = work(options)
    if jax.process_index() == 0:
        write_json(options.output, found)
    return 0


def alone_and_together(options: argparse.Namespace, folder: Path) -> dict[int, dict]:
    """The reports of one process and of two, on this machine."""
    reports = {}
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        own = folder / f"{count}"
        own.mkdir()
        command = [sys.executable, __file__, "--worker", "--model", options.model]
        command += ["--smoke"] * options.smoke
        command += ["--coordinator", f"localhost:{port}", "--processes", f"{count}"]
        command += ["--devices", f"{options.devices // count}"]
        command += ["--tensor", f"{options.tensor}", "--shared", f"{own}"]
        command += ["--output", f"{own / 'report.json'}"]
        environment = dict(os.environ)
        environment["JAX_PLATFORMS"] = "cpu"
        print(f"{count} of {options.devices} devices in all:", flush=True)
        running = [
            subprocess.Popen([*command, "--process", f"{i}"], env=environment)
            for i in range(count)
        ]
        try:
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
        if any(codes):
            raise SystemExit(f"the processes ended with {codes}")
        reports[count] = json.loads((own / "report.json").read_text("utf-8"))
    return reports


def apart(one: Any, two: Any) -> float:
    """How far two answers lie apart: 0 for equal ones, inf for unlike ones."""
    if one == two:
        return 0.0
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) / max(abs(one), 1e-3)
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return max(map(apart, one, two), default=0.0)
    return float("inf")


def main(arguments: list[str] | None = None) -> int:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--tensor", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--coordinator", default=None)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--shared", default="")
    options = parser.parse_args(arguments)
    options.tensor = options.tensor or (2 if options.smoke else 3)
    if options.worker:
        return worker(options)
    options.devices = options.devices or 2 * options.tensor
    if options.devices % (2 * options.tensor):
        parser.error(
            f"--devices {options.devices}: two processes need a multiple of twice "
            f"--tensor {options.tensor}"
        )
    with tempfile.TemporaryDirectory() as folder:
        reports = alone_and_together(options, Path(folder))
    one, two = reports[1]["parts"], reports[2]["parts"]
    rows, good = {}, all(report["intact"] for report in reports.values())
    print(f"{'part':12}{'1 process':>12}{'2 processes':>14}  apart")
    for name in one:
        far = apart(one[name]["answer"], two[name]["answer"])
        limit = LOSS if name in ("losses", "scores") else 0.0
        good &= far <= limit
        seconds = one[name]["seconds"], two[name]["seconds"]
        rows[name] = {"seconds": seconds, "apart": far, "limit": limit}
        print(f"{name:12}{seconds[0]:>10} s{seconds[1]:>12} s  {far:g}")
    verdict = "two processes equal one" if good else "TWO PROCESSES DIFFER FROM ONE"
    print(verdict)
    facts = {key: value for key, value in reports[2].items() if key != "parts"}
    model = "toy" if options.smoke else options.model
    write_json(
        options.output,
        {"model": model, **facts, "parts": rows, "equal": good, "verdict": verdict},
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
