"""Beam search against that of torch transformers, prompt by prompt."""

import functools
import json
import sys
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import naive_beam
import numpy as np
import pytest

from collab_jax import beam, decode
from collab_jax.io import canonical
from collab_jax.lm import language_model
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MARGIN = 1e-4  # a search with a closer decision than this may go either way
BEAMS = 4


def reference(model, prompts, new_tokens, penalty, early, eos):
    """The beams of each prompt, best first: `[(penalised score, new tokens), ...]`."""
    ids = torch.tensor(prompts)  # of one length: nothing is padded
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        max_new_tokens=new_tokens,
        length_penalty=penalty,
        early_stopping=early,
        eos_token_id=list(eos),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for score, text in zip(
        result.sequences_scores.tolist(), result.sequences.tolist(), strict=True
    ):
        new = text[ids.shape[1] :]
        ends = [i + 1 for i, token in enumerate(new) if token in eos]
        beams.append((score, new[: min([*ends, new_tokens])]))
    return [beams[i : i + BEAMS] for i in range(0, len(beams), BEAMS)]


def found(result, row):
    beams = jax.tree.map(lambda leaf: leaf[row].tolist(), result.info.beams)
    columns = zip(beams.score, beams.length, beams.tokens, strict=True)
    return [(score, tokens[:length]) for score, length, tokens in columns]


def least_margin(model, prompt, new_tokens, penalty, early, eos):
    """The closest decision of the search, by the reference's own log-probs."""

    @functools.cache
    def read(text):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1].double()
        return torch.log_softmax(logits, -1).tolist()

    margins = []
    log_probs = lambda text: read(tuple(text))  # noqa: E731
    settings = penalty, early, eos
    naive_beam.search(log_probs, prompt, BEAMS, new_tokens, *settings, margins=margins)
    return min(margins)


def compare(model, lm, params, prompts, new_tokens, penalties, earlies, eos):
    """One record a search: equal or not, the scores' gap, and the margin if not."""
    records = []
    for early in earlies:
        search = decode.compile(
            lambda penalty, early=early: beam.search(
                lm,
                new_tokens,
                BEAMS,
                length_penalty=penalty,
                early_stopping=early,
                eos=eos,
            )
        )
        for penalty in penalties:
            result = jax.device_get(
                search(penalty, params, *decode.pad(prompts), jax.random.key(0))
            )
            settings = new_tokens, penalty, early, eos
            for size in sorted({len(prompt) for prompt in prompts}):
                rows = [r for r, prompt in enumerate(prompts) if len(prompt) == size]
                same = [prompts[row] for row in rows]
                theirs = reference(model, same, *settings)
                for row, prompt, other in zip(rows, same, theirs, strict=True):
                    mine = found(result, row)
                    record = {
                        "prompt": row,
                        "length_penalty": penalty,
                        "early_stopping": early,
                        "best_equal": mine[0][1] == other[0][1],
                        "all_equal": [t for _, t in mine] == [t for _, t in other],
                        "score_gap": abs(mine[0][0] - other[0][0]),
                        "new_tokens": len(mine[0][1]),
                    }
                    if not record["all_equal"]:
                        record["margin"] = least_margin(model, prompt, *settings)
                    records.append(record)
    return records


def tiny(name, tmp_path):
    from parity.test_families import load_torch, write_folder

    raw = families.CASES[name]
    config = from_hf(raw)
    tensors = write_folder(tmp_path / "given", config, raw)
    params = jax.tree.map(jnp.asarray, canonical.load_tree(config, tensors.__getitem__))
    model = load_torch(tmp_path / "given")
    return model, language_model(transformer(config)), params, config.vocab


@pytest.fixture
def one_thread():
    """A small model is slower on two threads, and far slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_twenty_prompts(tmp_path, one_thread):
    eos = (2, 5, 11, 40)
    model, lm, params, vocab = tiny("llama", tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, vocab, 1 + size).tolist() for size in range(20)]
    records = compare(
        model, lm, params, prompts, 10, (0.0, 1.0, 2.0), (False, True, "never"), eos
    )
    assert len(records) == 180
    undecided = [r for r in records if not r["all_equal"]]
    assert all(r["margin"] < MARGIN for r in undecided), undecided
    assert len(undecided) < 5, undecided
    assert max(r["score_gap"] for r in records if r["best_equal"]) < 1e-4
    short = sum(r["new_tokens"] < 10 for r in records)
    assert short > 10, "no beam ended early: the test would not see its rules"


PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Q: What is 17 + 25?\nA:",
    "The three primary colours are",
    "import numpy as np\n\ndef softmax(x):\n",
    "In 1969, the first human beings",
    "Die Hauptstadt von Deutschland ist",
    "La vie est belle quand",
    "El perro corre por el",
    "日本の首都は",
    "Столица России",
    "To make bread you need flour,",
    "SELECT name, age FROM users WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "The theory of evolution explains how",
    "1, 1, 2, 3, 5, 8, 13,",
    "A",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
]


def smollm2():
    """The records of 20 prompts on the real model; about ten minutes on two cores."""
    from collab_jax.io import hub, load

    source = "smollm2-135m-instruct"
    loaded = load.load(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hub.fetch(source), dtype=torch.float32
    ).eval()
    prompts = loaded.tokenizer(PROMPTS)["input_ids"]
    eos = (loaded.tokenizer.eos_token_id,)
    knobs = (0.0, 1.0, 2.0), (False, True)
    return compare(model, loaded.lm, loaded.params, prompts, 32, *knobs, eos)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2():
    undecided = [record for record in smollm2() if not record["all_equal"]]
    assert all(record["margin"] < MARGIN for record in undecided), undecided


def main(path):
    """Writes what `smollm2` finds: counts, searches that differ, every record."""
    records = smollm2()
    summary = {
        "claim": "beam search of SmolLM2-135M-Instruct equals that of transformers",
        "settings": "20 prompts, 4 beams, 32 new tokens, float32, CPU",
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "searches": len(records),
        "all_four_beams_equal": sum(r["all_equal"] for r in records),
        "best_beam_equal": sum(r["best_equal"] for r in records),
        "largest_score_gap": max(r["score_gap"] for r in records if r["best_equal"]),
        "ended_before_the_limit": sum(r["new_tokens"] < 32 for r in records),
        "different": [r for r in records if not r["all_equal"]],
        "records": records,
    }
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in summary.items()]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(*lines[:-1], sep="\n")


# PYTHONPATH=tests python -m parity.test_beam FILE.json
if __name__ == "__main__":
    main(sys.argv[1])
