"""The real models beside torch: a few greedy tokens; experiments/parity_greedy.py has
more of them."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collab_jax import decode
from collab_jax.io import hub
from collab_jax.io.load import load

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("default"),  # what torch and its friends warn of
]
NEW = 16
TIE = 1e-4  # two best logits of the reference closer than this may come in either order
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Столица России — это 東京",
    "",
]


def reference(model, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """New tokens, and the logits `[N, V]` that each was chosen from."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).numpy()


def tied(step: int, tokens: set[int], logits: np.ndarray) -> bool:
    second, best = np.argsort(logits[step])[-2:]
    gap = logits[step, best] - logits[step, second]
    print(f"parted at step {step}: tokens {tokens}, two best logits {gap:.1e} apart")
    return gap <= TIE and tokens == {int(best), int(second)}


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_greedy(name):
    """One batch of ours, one prompt after the other in torch."""
    ours = load(name)
    theirs = AutoModelForCausalLM.from_pretrained(
        hub.fetch(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.generation_config.eos_token_id = None  # always to the last token
    prompts = [ours.tokenizer(text).input_ids for text in PROMPTS]
    prompts = [ids or [ours.tokenizer.bos_token_id] for ids in prompts]
    result = decode.run(
        decode.greedy(ours.lm, NEW),
        ours.params,
        *decode.pad(prompts),
        jax.random.key(0),
    )
    for row, prompt in zip(np.asarray(result.tokens), prompts, strict=True):
        mine = row[len(prompt) : len(prompt) + NEW].tolist()
        expected, logits = reference(theirs, prompt)
        assert len(expected) == NEW
        pairs = list(zip(mine, expected, strict=True))
        parted = [step for step, (a, b) in enumerate(pairs) if a != b]
        assert not parted or tied(parted[0], set(pairs[parted[0]]), logits)
