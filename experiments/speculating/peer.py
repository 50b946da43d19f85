"""What benchmarks of greedy text are compared with: models of torch transformers."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from speculating.subject import Subject


def torch_greedy(
    model: Any, subject: Subject, options: Callable[[], dict[str, Any]]
) -> Callable:
    """Greedy text of a model, and the seconds of the call that writes it.

    Args:
      model: of transformers.
      subject: how many new tokens, and which end a text.
      options: more of `generate`, made for each call.

    Returns:
      A function of prompts of one length, a list of new tokens for each.
    """
    import torch

    def generate(prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        tokens = torch.tensor(np.array(prompts))
        more = options()
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=subject.new,
                eos_token_id=list(subject.eos),
                pad_token_id=subject.eos[0],
                **more,
            )
        seconds = time.perf_counter() - begin
        return out[:, tokens.shape[1] :].tolist(), seconds

    return generate
