"""Writes encoder.npz: what torch transformers makes of the models of tests/encoders.py.

From the root of the checkout: PYTHONPATH=. python tests/golden/make_encoder.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import encoders  # noqa: E402


def outputs(name):
    """Last hidden states at the real tokens, `[sum of lengths, W]`."""
    made = encoders.config(name)
    config = AutoConfig.for_model(**encoders.CASES[name][0])
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config).eval()
    state = {k: torch.tensor(v) for k, v in encoders.tensors(made).items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    tokens, length, types = encoders.texts(made)
    real = np.arange(tokens.shape[1]) < length[:, None]
    # RoBERTa numbers positions by what is not padding
    arguments = {
        "input_ids": torch.tensor(np.where(real, tokens, made.pad_id)).long(),
        "attention_mask": torch.tensor(real).long(),
    }
    if made.token_types:
        arguments["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        return model(**arguments).last_hidden_state.numpy()[real]


if __name__ == "__main__":
    np.savez_compressed(
        HERE / "encoder.npz", **{name: outputs(name) for name in encoders.CASES}
    )
