"""Full fine-tuning against torch: three AdamW steps on the same tiny model and data."""

import jax
import numpy as np
import optax
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collab_jax.finetune import finetuner
from collab_jax.io.canonical import load_tree, save_tree
from collab_jax.models import transformer
from collab_jax.models.config import from_hf, to_hf
from collab_jax.packing import Batch

RNG = np.random.default_rng(0)
BATCHES = [
    Batch(
        RNG.integers(3, 37, (4, 12)).astype(np.int32),
        (RNG.uniform(size=(4, 12)) > 0.3).astype(np.float32),
    )
    for _ in range(4)
]
RATE, DECAY = 3e-3, 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_adamw_steps(tied):
    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 37,
            "hidden_size": 16,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": tied,
        }
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf(config)))
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    params = load_tree(config, lambda name: state[name])
    tuner = finetuner(
        transformer.transformer(config), optax.adamw(RATE, weight_decay=DECAY), chunk=5
    )
    tuned, step = tuner.init(params), jax.jit(tuner.step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    losses = []
    for batch in BATCHES:
        tuned, info = step((), tuned, batch)
        tokens = torch.tensor(batch.tokens).long()
        weights = torch.tensor(batch.weights)[:, 1:]
        logits = model(tokens).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        loss = (nats * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        losses.append((float(info.loss), loss.item()))
        np.testing.assert_allclose(float(info.norm), norm.item(), rtol=1e-4)
    mine, theirs = np.array(losses).T
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert abs(np.diff(theirs)).max() > 1e-3  # the steps did something
    after = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    for name, tensor in save_tree(config, tuned.params):
        np.testing.assert_allclose(tensor, after[name], atol=2e-5, err_msg=name)
