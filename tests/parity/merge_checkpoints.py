"""Small random checkpoints of torch transformers, and mergekit run on them."""

import json
import logging
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import small_tokenizers as small
import torch
import transformers
import yaml

from collab_jax.io.safetensors import open_folder
from collab_jax.merge import files, jobs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

transformers.utils.logging.disable_progress_bar()
for name in ("mergekit", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)

BF16 = np.dtype(ml_dtypes.bfloat16)
MODELS = "models: [{model: NAME1}, {model: NAME2}]"
COMMON = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 40}
COMMON |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 64, "pad_token_id": None}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
        | {"num_experts_per_tok": 2},
    ),
}
GPT2 = {"vocab_size": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def family(name, **more):
    """The configuration of a small model."""
    if name == "gpt2":
        return transformers.GPT2Config(**GPT2 | more, bos_token_id=1, eos_token_id=2)
    kind, own = FAMILIES[name]
    return kind(**COMMON | own | more)


def write(folder, config, seed, dtype=torch.float32, tokenizer=None, **options):
    """A fine-tune of the model with seed 0: norms and biases differ too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    draw = torch.Generator().manual_seed(17 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            start = torch.Generator().manual_seed(parameter.numel())
            parameter += 0.2 * torch.randn(parameter.shape, generator=start)
            noise = torch.randn(parameter.shape, generator=draw)
            parameter += 0.05 * bool(seed) * noise
    folder = Path(folder)
    model.to(dtype).save_pretrained(folder, **options)
    (tokenizer or small.first()).save_pretrained(folder)
    return folder


def mergekit(text, out, **options):
    """mergekit's folder for a document."""
    document = MergeConfiguration.model_validate(yaml.safe_load(text))
    defaults = {"quiet": True, "random_seed": 0, "write_model_card": False}
    given = MergeOptions(**defaults | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_merge(document, str(out), given, config_source=text)
    return Path(out)


def inputs(recipe):
    """Tensor -> the largest magnitude of what its entries are made from."""
    [stage] = recipe.stages
    vocabulary = jobs.vocabulary_of(stage, recipe.sources)
    found = {}
    rows = vocabulary and vocabulary.rows
    for job in jobs.jobs(stage, recipe.sources, rows):
        base, experts = job.read()
        arrays = [a.astype(np.float64) for a in (base, *experts) if a is not None]
        found[job.name] = np.abs(arrays).max(0)
    return found


def check(text, out, sizes=None, **options):
    """Our folder and mergekit's; their tensors are compared."""
    recipe = files.prepare(text)
    files.run(recipe, out / "ours")
    mergekit(text, out / "theirs", **options)
    sizes = inputs(recipe) if sizes is None else sizes
    compare(out, sizes)
    return out


def compare(out, sizes):
    ours, theirs = open_folder(out / "ours"), open_folder(out / "theirs")
    assert set(ours.layouts) == set(theirs.layouts)
    for name, layout in theirs.layouts.items():
        assert ours.layouts[name] == layout, name
        found, expected = (x.read(name).astype(np.float64) for x in (ours, theirs))
        bar = 1e-6 * (np.abs(expected) + sizes.get(name, np.abs(expected).max()))
        if layout.dtype == BF16:
            last = 2.0 ** (np.frexp(np.where(expected == 0, 1e-30, expected))[1] - 8)
            bar = np.maximum(bar, last)
        gap = np.abs(found - expected)
        assert (gap <= bar).all(), (name, gap.max(), found.shape)


KEYS = ("architectures", "model_type", "vocab_size", "num_hidden_layers", "n_layer")
KEYS += ("tie_word_embeddings", "hidden_size")


def check_config(out):
    ours, theirs = (
        json.loads((out / name / "config.json").read_text())
        for name in ("ours", "theirs")
    )
    for key in KEYS:
        if key == "tie_word_embeddings":  # where a family's default is not written
            continue
        assert ours.get(key) == theirs.get(key), key
    dtypes = [
        config.get("dtype") or config.get("torch_dtype") for config in (ours, theirs)
    ]
    assert dtypes[0] == dtypes[1]


def load(folder):
    """torch's model, to the last tensor that of the folder."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model


def check_loads(folder):
    model = load(folder)
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
        made_ids = model.generate(
            ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert made_ids.shape == (1, 7)
    return model
