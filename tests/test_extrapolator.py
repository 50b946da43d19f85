"""The layer of a feature drafter against numpy, and its place in other families."""

import features as small
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.lm import Features
from collab_jax.models.config import from_hf
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.transformer import init, transformer

HEADS, KV_HEADS, SIZE = 4, 2, 8


def norm(x, scale):
    return x / np.sqrt((x**2).mean() + small.CONFIG.eps) * scale


def rotated(x, place):
    """Pairs (i, i + K / 2) turned by `place / 10000^(2 i / K)`."""
    half = SIZE // 2
    angle = place / 10000.0 ** (np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def twin(params, embedded, before):
    """The guesses of one row, in loops and float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    block = p["block"]
    heads = block["attention"]
    keys, values, found = [], [], []
    for t, (e, f) in enumerate(zip(embedded, before, strict=True)):
        pair = np.concatenate(
            [norm(e, p["embed_norm"]["scale"]), norm(f, p["feature_norm"]["scale"])]
        )
        x = pair @ p["fc"]["kernel"] + p["fc"]["bias"]
        y = norm(x, block["attention_norm"]["scale"])
        q, k, v = ((y @ heads[n]["kernel"]).reshape(-1, SIZE) for n in "qkv")
        keys.append([rotated(head, t) for head in k])
        values.append(v)
        mixed = []
        for h in range(HEADS):
            own = h // (HEADS // KV_HEADS)
            query = rotated(q[h], t)
            scores = np.array([query @ key[own] for key in keys]) / np.sqrt(SIZE)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(w * v[own] for w, v in zip(weights, values, strict=True)))
        x = x + np.concatenate(mixed) @ heads["o"]["kernel"]
        y = norm(x, block["mlp_norm"]["scale"])
        gate = y @ block["mlp"]["gate"]["kernel"]
        inner = gate / (1 + np.exp(-gate)) * (y @ block["mlp"]["up"]["kernel"])
        found.append(
            norm(x + inner @ block["mlp"]["down"]["kernel"], p["norm"]["scale"])
        )
    return np.stack(found)


def random_params(layer, base):
    """No scale is 1 and no bias is 0."""
    params = layer.init(jax.random.key(3), base)
    leaves, rest = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(
        rest,
        [
            x + 0.3 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def test_guesses_are_their_twin():
    params = random_params(small.LAYER, small.BASE)
    x, f = np.random.default_rng(0).normal(size=(2, 2, 7, small.WIDTH))
    x, f = x.astype(np.float32), f.astype(np.float32)
    cache = small.LAYER.start(params, 2, 9)
    first, cache = small.LAYER.read(params, cache, x[:, :3], f[:, :3])
    second, cache = small.LAYER.read(params, cache, x[:, 3:], f[:, 3:])
    got = np.concatenate([first, second], axis=1)
    for row in range(2):
        want = twin(params, np.float64(x[row]), np.float64(f[row]))
        np.testing.assert_allclose(got[row], want, atol=1e-4)
        other = twin(params, np.float64(x[row]), np.float64(np.roll(f[row], 1, 0)))
        assert abs(got[row] - other).max() > 0.1
    assert cache.length.tolist() == [7, 7]


def test_what_the_layer_sees():
    x = np.random.default_rng(1).normal(size=(3, 1, 4, small.WIDTH)).astype(np.float32)
    features = Features(x[0], {"hidden.0": x[1], "hidden.2": x[2], "hidden.1": x[0]})
    np.testing.assert_array_equal(small.LAYER.see({}, features), x[0])
    fused = extrapolator(small.CONFIG, ("hidden.2", "hidden.0"))
    params = fused.init(jax.random.key(0), small.BASE)
    both = np.concatenate([x[2], x[1]], axis=-1)
    want = both @ np.asarray(params["fuse"]["kernel"])
    np.testing.assert_allclose(fused.see(params, features), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"no \['hidden.2'\], only \['hidden.0'\]"):
        fused.see(params, Features(x[0], {"hidden.0": x[1]}))


def test_it_starts_with_the_scale_of_the_last_norm():
    scale = {"scale": jnp.arange(1.0, 33.0)}
    params = small.LAYER.init(jax.random.key(0), small.BASE | {"norm": scale})
    np.testing.assert_array_equal(params["norm"]["scale"], scale["scale"])


@pytest.mark.parametrize(
    "family",
    [
        # a window in some layers, another rotation there, a scaled embedding
        {"model_type": "gemma3_text", "sliding_window": 4, "head_dim": 8},
        # learned positions, layer norms with a mean
        {"model_type": "gpt2", "n_positions": 32, "n_embd": 32, "n_layer": 2}
        | {"n_head": 4},
        # norms behind the sub-layers
        {"model_type": "olmo2"},
        # experts
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    ],
)
def test_it_fits_other_families(family):
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    config = from_hf((sizes if family["model_type"] != "gpt2" else {}) | family)
    backbone, layer = transformer(config), extrapolator(config)
    base = init(jax.random.key(0), config)
    params = layer.init(jax.random.key(1), base)
    tokens = jnp.arange(8)[None]
    x = backbone.embed(base, tokens)
    seen = layer.see(params, backbone.features(base, None, x)[0])
    one, _ = layer.read(params, layer.start(params, 1, 8), x, seen)
    cache, parts = layer.start(params, 1, 8), []
    for t in range(8):
        part, cache = layer.read(params, cache, x[:, t : t + 1], seen[:, t : t + 1])
        parts.append(part)
    np.testing.assert_allclose(one, jnp.concatenate(parts, 1), atol=2e-5)
    assert backbone.unembed(base, one).shape == (1, 8, config.vocab)
    # it sees the first token from the last one
    moved, _ = layer.read(params, layer.start(params, 1, 8), x.at[:, 0].add(1.0), seen)
    assert abs(moved - one)[0, -1].max() > 1e-6
