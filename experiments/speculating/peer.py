"""What benchmarks of greedy text are compared with: models of torch transformers."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from speculating.subject import Subject

from collab_jax.io import load


def torched(model: load.Model) -> Any:
    """The model of transformers in float32, of the same configuration and parameters.

    Args:
      model: as `load` gives it.
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        load.save(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )


def torch_greedy(
    model: Any, subject: Subject, options: Callable[[], dict[str, Any]]
) -> Callable:
    """Greedy text of a model, the seconds that it took, and its calls of the model.

    Args:
      model: of transformers.
      subject: how many new tokens, and which end a text.
      options: more of `generate`, made for each call.

    Returns:
      A function of prompts of one length: a list of new tokens for each, the seconds,
      and for each how often the model was called.
    """
    import torch

    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))

    def generate(prompts: list[list[int]]) -> tuple[list[list[int]], float, list[int]]:
        calls.clear()
        tokens = torch.tensor(np.array(prompts))
        more = options()
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                eos_token_id=list(subject.eos),
                pad_token_id=subject.eos[0],
                **{"max_new_tokens": subject.new} | more,
            )
        seconds = time.perf_counter() - begin
        new = out[:, tokens.shape[1] :].tolist()
        return new, seconds, [len(calls)] * len(prompts)

    return generate
