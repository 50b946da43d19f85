"""Every decoder family against torch transformers, and its folders both ways."""

import dataclasses
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from collab_jax.io import canonical
from collab_jax.lm import language_model
from collab_jax.models.config import from_hf, long_context, to_hf
from collab_jax.models.transformer import transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # of the logits' standard deviation
MARGIN = 1e-4  # routers closer than this may choose either expert


def read(raw):
    config = from_hf(raw)
    return (
        long_context(config)
        if raw.get("original_max_position_embeddings") == 8
        else (config)
    )


def write_folder(folder, config, raw):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = families.tensors(config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load_torch(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval()


def torch_logits(model, tokens, length):
    """Logits `[B, T, V]` row by row, and the least router margin `[B, T]`."""
    margin = np.full(tokens.shape, np.inf)
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    seen = []
    hooks = [
        router.register_forward_hook(
            lambda module, args, out: seen.append(
                torch.topk(torch.softmax(out[0], -1), module.top_k + 1)[0]
            )
        )
        for router in routers
    ]
    rows = []
    with torch.no_grad():
        for b, size in enumerate(length):
            seen.clear()
            row = torch.tensor(tokens[b : b + 1, :size], dtype=torch.long)
            logits = model(row, use_cache=False).logits[0].numpy()
            rows.append(np.pad(logits, ((0, tokens.shape[1] - size), (0, 0))))
            for top in seen:
                gap = (top[:, -2] - top[:, -1]).numpy()
                margin[b, :size] = np.minimum(margin[b, :size], gap)
    for hook in hooks:
        hook.remove()
    return np.stack(rows), margin


def whole(backbone, params, tokens):
    features, _ = backbone.features(params, None, backbone.embed(params, tokens))
    return backbone.unembed(params, features.hidden)


def chunked(lm, params, tokens, length):
    """Logits of three chunks, then of each row's last three tokens read once more."""
    state = lm.init(params, tokens.shape[0], 32)
    parts = []
    for start, stop in ((0, 7), (7, 16), (16, tokens.shape[1])):
        out, state = lm.extend(params, state, tokens[:, start:stop])
        parts.append(out.logits)
    state = lm.rewind(state, tokens.shape[1] - length + 3)
    last = (length - 3)[:, None] + np.arange(3)
    out, _ = lm.extend(params, state, np.take_along_axis(tokens, last, 1))
    return jnp.concatenate(parts, axis=1), out.logits


def difference(found, expected, checked):
    gap = np.abs(np.asarray(found) - expected).max(-1)
    return gap[checked].max() / expected[checked].std()


@pytest.mark.parametrize("name", families.CASES)
def test_logits(name, tmp_path):
    raw = families.CASES[name]
    config = read(raw)
    tensors = write_folder(tmp_path / "given", config, raw)
    expected, margin = torch_logits(
        load_torch(tmp_path / "given"), *families.batch(config)
    )
    params = canonical.load_tree(config, tensors.__getitem__)
    params = jax.tree.map(jnp.asarray, params)
    tokens, length = families.batch(config)
    backbone = transformer(config)
    valid = np.arange(tokens.shape[1]) < length[:, None]
    decided = margin > MARGIN
    checked = valid & decided
    apart = int((valid & ~decided).sum())
    assert apart < 5, f"{apart} positions with an undecided router"

    gaps = {
        "whole": difference(
            jax.jit(whole, static_argnums=0)(backbone, params, tokens),
            expected,
            checked,
        )
    }
    parts, again = jax.jit(chunked, static_argnums=0)(
        language_model(backbone), params, tokens, length
    )
    gaps["chunked"] = difference(parts, expected, checked)
    last = (length - 3)[:, None] + np.arange(3)
    gaps["again"] = difference(
        again,
        np.take_along_axis(expected, last[..., None], 1),
        np.take_along_axis(checked, last, 1),
    )
    print(name, {k: f"{v:.1e}" for k, v in gaps.items()}, f"apart: {apart}")
    assert max(gaps.values()) <= TOLERANCE, gaps


@pytest.mark.parametrize("name", families.CASES)
def test_folder_of_our_own(name, tmp_path):
    """Our config.json with our tensor names is the model that the given one was."""
    raw = families.CASES[name]
    config = read(raw)
    assert (
        read(
            to_hf(config)
            | {k: v for k, v in raw.items() if k == "original_max_position_embeddings"}
        )
        == config
    )
    write_folder(tmp_path / "given", config, raw)
    write_folder(tmp_path / "ours", config, to_hf(config))
    given, ours = load_torch(tmp_path / "given"), load_torch(tmp_path / "ours")
    tokens, length = families.batch(config)
    expected, _ = torch_logits(given, tokens, length)
    found, _ = torch_logits(ours, tokens, length)
    assert np.abs(found - expected).max() <= 1e-5 * expected.std()

    given.save_pretrained(tmp_path / "torch")
    saved = load_file(tmp_path / "torch" / "model.safetensors")
    tensors = families.tensors(config)
    assert set(saved) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


def _edit_rotary(config, **changes):
    rotary = tuple(r._replace(**changes) for r in config.rotary)
    return dataclasses.replace(config, rotary=rotary)


WRONG = {
    "mistral": lambda c: dataclasses.replace(
        c, windows=tuple(w + 1 for w in c.windows)
    ),
    "gemma2": lambda c: dataclasses.replace(c, attention_cap=None),
    "gemma3": lambda c: dataclasses.replace(c, rotary=c.rotary[::-1][1:] * 2),
    "llama3_tied_biased": lambda c: _edit_rotary(c, scaling=None),
    "llama_yarn": lambda c: _edit_rotary(
        c, scaling=c.rotary[0].scaling._replace(attention=1.0)
    ),
    "phi3_long_partial": lambda c: _edit_rotary(
        c, scaling=c.rotary[0].scaling._replace(use_long=False)
    ),
    "gpt2": lambda c: dataclasses.replace(c, activation="gelu"),
    "gpt_neox": lambda c: dataclasses.replace(c, parallel=False),
    "qwen3_moe": lambda c: dataclasses.replace(c, renormalise=False),
    "olmo2": lambda c: dataclasses.replace(c, eps=1e-3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_fails(name, tmp_path):
    raw = families.CASES[name]
    config = read(raw)
    tensors = write_folder(tmp_path / "given", config, raw)
    tokens, length = families.batch(config)
    expected, _ = torch_logits(load_torch(tmp_path / "given"), tokens, length)
    wrong = WRONG[name](config)
    if wrong.family == "phi3":
        wrong = dataclasses.replace(
            wrong,
            rotary=tuple(
                r._replace(scaling=r.scaling._replace(original=64))
                for r in wrong.rotary
            ),
        )
    params = canonical.load_tree(config, tensors.__getitem__)
    params = jax.tree.map(jnp.asarray, params)
    found = jax.jit(whole, static_argnums=0)(transformer(wrong), params, tokens)
    checked = np.arange(tokens.shape[1]) < length[:, None]
    assert difference(found, expected, checked) > TOLERANCE
