"""Greedy continuations of the real models beside those of torch transformers.

Claim: 64 greedy tokens of SmolLM2-135M-Instruct and of Gemma-3-270M are those of
transformers (eager attention, float32, its own reading of the GGUF file) on 24 prompts
each: English, code, other scripts, empty, one token, 1,500 tokens. A row's tokens do
not depend on its batch, greedy or sampled. A difference counts as none only where the
two best candidates are shown to lie within 1e-4.
Command: python experiments/parity_greedy.py [--smoke] [--output FILE] [--model NAME];
a run that was stopped is taken up again. Needs the extra `parity`.
Hardware: two CPU cores, 6 GiB; about 20 minutes beside other work (`--smoke`:
seconds, a random toy model).
Expected: 48 of 48 continuations equal, 48 of 48 rows equal in batches of 8, greedy and
sampled; largest |logit difference| under 1e-4 of the logits' standard deviation.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from collab_jax import decode, law, lm, warp
from collab_jax.io import canonical, hub
from collab_jax.io.load import load
from collab_jax.models import config as configs
from collab_jax.models import transformer

TIE = 1e-4  # two candidates closer than this may come in either order
TEMPERATURE = 0.8
ROWS = 8  # of a batch
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
LICENSE = Path(__file__).parents[1] / "LICENSE"  # any long text
PROMPTS = [  # in this order, so that every batch has rows of all kinds
    ("English", "The capital of France is"),
    ("code", "def fibonacci(n):\n    "),
    ("scripts", "中国的首都是北京"),
    ("empty", ""),
    ("English", "Once upon a time, in a village by the sea, there lived"),
    ("code", "import numpy as np\n\ndef softmax(x):\n    return"),
    ("scripts", "القاهرة هي عاصمة"),
    ("one token", "The"),
    ("English", "Water boils at 100 degrees because"),
    ("code", "SELECT name, age FROM users WHERE"),
    ("scripts", "भारत की राजधानी"),
    ("English", "Q: What is 17 + 25?\nA:"),
    ("1,500 tokens", ""),
    ("code", '{"name": "Ada", "born": 1815, "works": ['),
    ("scripts", "Столица России — это"),
    ("English", "In 1969, the first human beings"),
    ("code", "#include <stdio.h>\n\nint main(void) {\n"),
    ("scripts", "🎉🎂 Happy birthday! 🥳"),
    ("one token", "for"),
    ("English", "Dear Sir or Madam,\n\nI am writing to"),
    ("code", "for i in range(10):\n    if i % 2 == 0:\n"),
    ("scripts", "日本の首都は東京です。"),
    ("English", "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"),
    ("scripts", "La vie est belle; das Leben ist schön;"),
]


class Subject(NamedTuple):
    """A model on both sides, and its prompts as tokens."""

    lm: lm.LM
    params: Any
    torch_model: Any
    prompts: list[list[int]]
    new_tokens: int
    widths: tuple[int, int]  # prompts are padded to one of these, for few programs


def real(name: str) -> Subject:
    """A model of the wheels; torch reads the same file without any of our help."""
    ours = load(name)
    with tempfile.TemporaryDirectory() as alone:  # the file, and nothing we wrote
        file = hub.MODELS[name].file
        Path(alone, file).symlink_to(hub.fetch(name) / file)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            alone, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
        )
    start = ours.tokenizer.bos_token_id
    long = ours.tokenizer(LICENSE.read_text("utf-8")).input_ids[:1500]
    prompts = []
    for kind, text in PROMPTS:
        ids = long if kind == "1,500 tokens" else ours.tokenizer(text).input_ids
        if kind == "one token":
            ids = ids[-1:]
        prompts.append(list(ids) or [start])
    return Subject(ours.lm, ours.params, theirs.eval(), prompts, 64, (64, 1536))


def toy() -> Subject:
    """A random Llama on both sides; bytes are its tokens."""
    config = configs.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    params = transformer.init(jax.random.key(0), config)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **configs.to_hf(config), attn_implementation="eager", dtype="float32"
        )
    )
    state = {k: torch.tensor(v) for k, v in canonical.save_tree(config, params)}
    theirs.load_state_dict(state)
    texts = [LICENSE.read_text()[:200] if k[0] == "1" else t for k, t in PROMPTS]
    prompts = [list(text.encode())[:64] or [256] for text in texts]
    prompts[12] = list(texts[12].encode())
    model = lm.language_model(transformer.transformer(config))
    return Subject(model, params, theirs.eval(), prompts, 12, (64, 256))


def reference(subject: Subject, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """New tokens of `generate`, and the logits `[N, V]` that each was chosen from."""
    ids = torch.tensor([prompt])
    subject.torch_model.generation_config.eos_token_id = None  # to the last token
    with torch.no_grad():
        out = subject.torch_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=subject.new_tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).numpy()


class Programs(NamedTuple):
    """Ours, compiled once for every shape."""

    greedy: Callable
    sampled: Callable
    read: Callable  # (params, prompt, length, new [B, N]) -> logits [B, N, V]


def programs(subject: Subject) -> Programs:
    """The decoders of a subject, and its logits behind given tokens by the cache."""
    count, model = subject.new_tokens, subject.lm

    def read(params, prompt, length, new):
        state, _ = decode.start(model, params, prompt, length, count, 128)
        last = jnp.take_along_axis(prompt, length[:, None] - 1, axis=1)
        tokens = jnp.concatenate([last, new[:, :-1]], axis=1)
        return model.extend(params, state, tokens)[0].logits

    tempered = lambda t: warp.warp(model, warp.temperature(t))  # noqa: E731
    return Programs(
        decode.compile(lambda _: decode.greedy(model, count)),
        decode.compile(lambda t: decode.sample(tempered(t), count // 2)),
        jax.jit(read),
    )


def padded(subject: Subject, rows: list[int]):
    """The prompts of some rows, padded to one of the two widths."""
    prompts = [subject.prompts[row] for row in rows]
    longest = max(map(len, prompts))
    return decode.pad(prompts, min(w for w in subject.widths if w >= longest))


def row_key(row: int) -> jax.Array:
    """The key of a row, whatever batch it is in."""
    return jax.random.fold_in(jax.random.key(2026), row)


def new_tokens(result: decode.Sequences) -> list[list[int]]:
    """What was appended to each row."""
    tokens, begin = np.asarray(result.tokens), np.asarray(result.prompt_length)
    end = np.asarray(result.length)
    return [t[a:b].tolist() for t, a, b in zip(tokens, begin, end, strict=True)]


def split(one: list[int], other: list[int], scores: Callable) -> dict | None:
    """Where two rows part, and how close the two best candidates were there.

    `scores(step)` gives what the token of that step is the argmax of, `[V]`.
    """
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if not differ:
        return None
    step = differ[0]
    found = np.asarray(scores(step), np.float64)
    best = np.argsort(-found)[:2]
    gap = float(found[best[0]] - found[best[1]])
    tie = gap <= TIE and {one[step], other[step]} == set(best.tolist())
    return {"step": step, "tokens": [one[step], other[step]], "gap": gap, "tie": tie}


def alone(subject: Subject, run: Programs, row: int) -> dict[str, Any]:
    """One prompt by itself: ours, theirs, and how far the logits lie apart."""
    theirs, expected = reference(subject, subject.prompts[row])
    prompt, length = padded(subject, [row])
    keys = jnp.stack([row_key(row)])
    (ours,) = new_tokens(run.greedy(None, subject.params, prompt, length, keys))
    (drawn,) = new_tokens(
        run.sampled(TEMPERATURE, subject.params, prompt, length, keys)
    )
    logits = run.read(subject.params, prompt, length, jnp.array([theirs]))[0]
    error = np.abs(np.asarray(logits) - expected).max() / expected.std()
    two = np.sort(np.partition(expected, -2, axis=-1)[:, -2:], axis=-1)
    return {
        "kind": PROMPTS[row][0],
        "prompt_tokens": len(subject.prompts[row]),
        "equal": ours == theirs,
        "parted": split(theirs, ours, lambda step: expected[step]),
        "logit_error": float(error),
        "closest_choice": float((two[:, 1] - two[:, 0]).min()),
        "tokens": ours,
        "sampled": drawn,
    }


def together(subject: Subject, run: Programs, rows: list[int], single: dict) -> dict:
    """The same rows in one batch; `single[row]` is what `alone` found."""
    prompt, length = padded(subject, rows)
    keys = jnp.stack([row_key(row) for row in rows])
    greedy = new_tokens(run.greedy(None, subject.params, prompt, length, keys))
    drawn = new_tokens(run.sampled(TEMPERATURE, subject.params, prompt, length, keys))
    found: dict[str, Any] = {"rows": rows, "prompt_tokens": length.tolist()}

    def perturbed(row: int, kind: str):
        new = single[row][kind] + [0] * (subject.new_tokens - len(single[row][kind]))
        one = padded(subject, [row])
        logits = run.read(subject.params, *one, jnp.array([new]))[0]
        if kind == "tokens":
            return lambda step: logits[step]

        def scores(step):
            place = one[1] + step
            keys = jnp.stack([row_key(row)])
            return (
                logits[step] / TEMPERATURE + law.noise(keys, place, logits.shape[-1])[0]
            )

        return scores

    for kind, tokens in (("tokens", greedy), ("sampled", drawn)):
        parted = {}
        for row, mine in zip(rows, tokens, strict=True):
            if mine != single[row][kind]:
                parted[row] = split(single[row][kind], mine, perturbed(row, kind))
        name = "greedy" if kind == "tokens" else kind
        found[f"{name}_equal"] = len(rows) - len(parted)
        found[f"{name}_parted"] = parted
    return found


def write(path: Path, results: dict) -> None:
    """Replaces the file by a whole one, a record a line."""

    def lines(value, depth=1):
        if depth > 3 or not isinstance(value, dict) or not value:
            return json.dumps(value)
        inner = [f"{json.dumps(k)}: {lines(v, depth + 1)}" for k, v in value.items()]
        pad = " " * depth
        return "{\n" + ",\n".join(pad + line for line in inner) + f"\n{pad[1:]}}}"

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(lines(results) + "\n", "utf-8")
    os.replace(temporary, path)


def show(model: str, found: dict[str, Any]) -> bool:
    """Prints the table of a model; True where nothing parted but ties."""
    print(f"\n{model}")
    print(f"{'prompts':14} {'equal':>7} {'ties':>5} {'logit error / std':>18}")
    good = True
    prompts = found["prompts"].values()
    for kind in dict.fromkeys(p["kind"] for p in prompts):
        these = [p for p in prompts if p["kind"] == kind]
        equal, ties = (
            sum(p["equal"] for p in these),
            [p["parted"] for p in these if p["parted"] and p["parted"]["tie"]],
        )
        good &= equal + len(ties) == len(these)
        error = max(p["logit_error"] for p in these)
        print(f"{kind:14} {equal:3}/{len(these):3} {len(ties):5} {error:18.1e}")
        good &= error < 1e-4
    for name in ("greedy", "sampled"):
        batches = found["batches"].values()
        parted = [p for b in batches for p in b[f"{name}_parted"].values()]
        ties = sum(p["tie"] for p in parted)
        rows = sum(len(b["rows"]) for b in batches)
        equal = sum(b[f"{name}_equal"] for b in batches)
        print(f"batch, {name:7} {equal:3}/{rows:3} {ties:5}")
        good &= ties == len(parted)
    every = [p["parted"] for p in prompts if p["parted"]]
    for parted in every + [
        p
        for b in found["batches"].values()
        for name in ("greedy", "sampled")
        for p in b[f"{name}_parted"].values()
    ]:
        print("parted:", json.dumps(parted))
    return good


def main(arguments: list[str] | None = None) -> int:
    """Runs what is not yet in the output; 0 where nothing parted but ties."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "parity_greedy.json"
    parser.add_argument("--smoke", action="store_true", help="a toy model, seconds")
    parser.add_argument("--model", action="append", choices=MODELS, metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    path = chosen.output or (Path("parity_smoke.json") if chosen.smoke else default)
    torch.set_num_threads(1)  # its threads wait by spinning, beside those of XLA
    modules = (jax, torch, transformers)
    run_by = {"versions": {m.__name__: m.__version__ for m in modules}}
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if results.get("run") != run_by:
        results = {"run": run_by, "models": {}}
    good = True
    for model in ["toy"] if chosen.smoke else chosen.model or MODELS:
        found = results["models"].setdefault(model, {"prompts": {}, "batches": {}})
        batches = [list(range(i, i + ROWS)) for i in range(0, len(PROMPTS), ROWS)]
        if len(found["batches"]) < len(batches):
            subject = toy() if chosen.smoke else real(model)
            run = programs(subject)
            for row in range(len(PROMPTS)):
                if str(row) not in found["prompts"]:
                    found["prompts"][str(row)] = alone(subject, run, row)
                    write(path, results)
                    print(f"{model}: prompt {row + 1} of {len(PROMPTS)}", flush=True)
            single = {int(row): p for row, p in found["prompts"].items()}
            for i, rows in enumerate(batches):
                if str(i) not in found["batches"]:
                    found["batches"][str(i)] = together(subject, run, rows, single)
                    write(path, results)
                    print(f"{model}: batch {i + 1} of {len(batches)}", flush=True)
            del subject, run
        good &= show(model, found)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
