"""Adapters in a checkpoint: a naive twin in numpy, and everything that is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from collab_jax.io.delta import with_lora
from collab_jax.io.safetensors import Checkpoint, Layout, missing, write

BF16 = np.dtype(ml_dtypes.bfloat16)
STEM = "base_model.model."
Q, EMBED = "model.layers.0.q_proj", "model.embed_tokens"


def rng(seed=0):
    return np.random.default_rng(seed)


def checkpoint(tensors):
    def read(name):
        if name not in tensors:
            raise missing(name, tensors)
        return tensors[name]

    layouts = {name: Layout(x.dtype, x.shape) for name, x in tensors.items()}
    return Checkpoint(layouts, read)


def base(dtype=np.float32):
    """Linear [6, 4] with a bias, a square one, an embedding [9, 4], a head."""
    shapes = {
        f"{Q}.weight": (6, 4),
        f"{Q}.bias": (6,),
        "model.layers.0.o_proj.weight": (4, 4),
        f"{EMBED}.weight": (9, 4),
        "lm_head.weight": (9, 4),
    }
    draw = rng()
    return {n: draw.normal(size=s).astype(dtype) for n, s in shapes.items()}


def adapter(folder, tensors, **settings):
    """Writes an adapter; a setting of None is left out."""
    common = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(common))
    named = {STEM + name: x for name, x in tensors.items()}
    layouts = {name: Layout(x.dtype, x.shape) for name, x in named.items()}
    write(folder / "adapter_model.safetensors", layouts, named.values())
    return folder


def factors(module, size_out, size_in, rank=2, dtype=np.float32, seed=1):
    draw = rng(seed)
    return {
        f"{module}.lora_A.weight": draw.normal(size=(rank, size_in)).astype(dtype),
        f"{module}.lora_B.weight": draw.normal(size=(size_out, rank)).astype(dtype),
    }


def twin(weight, a, b, scale):
    """W + s B A by loops, in float64."""
    out = weight.astype(np.float64)
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            for r in range(len(a)):
                out[o, i] += scale * float(b[o, r]) * float(a[r, i])
    return out


def close(array, reference, dtype):
    """Within 1e-6, or a unit in the last place where there are fewer digits."""
    assert array.dtype == dtype
    unit = max(float(ml_dtypes.finfo(dtype).eps), 1e-6)
    bound = np.abs(reference) + np.abs(reference).max()
    assert np.all(np.abs(array.astype(np.float64) - reference) <= unit * bound)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16])
@pytest.mark.parametrize("kind", [np.float32, BF16])
def test_linear(tmp_path, dtype, kind):
    """W + s B A in the type of W; everything else is as it was."""
    tensors, pair = base(dtype), factors(Q, 6, 4, dtype=kind)
    found = with_lora(checkpoint(tensors), adapter(tmp_path, pair))
    a, b = pair.values()
    name = f"{Q}.weight"
    close(found.read(name), twin(tensors[name], a, b, 1.5), np.dtype(dtype))
    assert list(found.layouts) == list(tensors)
    for other in set(tensors) - {name}:
        assert found.read(other) is tensors[other]
    assert found.read(name).flags.writeable is False
    with pytest.raises(ValueError, match="is missing"):
        found.read("other")


def test_the_sum_is_rounded_once(tmp_path):
    """Negative control: to round what is added before adding it gives other numbers."""
    tensors, pair = base(BF16), factors(Q, 6, 4)
    found = with_lora(checkpoint(tensors), adapter(tmp_path, pair))
    a, b = pair.values()
    name = f"{Q}.weight"
    product = (b @ a) * np.float32(1.5)
    once = (tensors[name].astype(np.float32) + product).astype(BF16)
    twice = (tensors[name].astype(np.float32) + product.astype(BF16)).astype(BF16)
    np.testing.assert_array_equal(found.read(name), once)
    assert not np.array_equal(once, twice)


def test_scales(tmp_path):
    """alpha / R and alpha / sqrt(R), by the first pattern that fits."""
    name, tensors, pair = f"{Q}.weight", base(), factors(Q, 6, 4, rank=4)
    a, b = pair.values()
    cases = (
        ({"r": 4}, 3 / 4),
        ({"r": 4, "use_rslora": True}, 3 / 2),
        ({"rank_pattern": {"q_proj": 4}}, 3 / 4),
        ({"rank_pattern": {"q_proj": 4}, "use_rslora": True}, 3 / 2),
        ({"r": 4, "alpha_pattern": {r"layers\.\d.q_proj": 8}}, 2),
        ({"r": 4, "alpha_pattern": {"_proj": 8, "q_pro": 8}}, 3 / 4),
        ({"r": 4, "alpha_pattern": {"q_proj": 1, "0.q_proj": 8}}, 1 / 4),
    )
    for settings, scale in cases:
        found = with_lora(checkpoint(tensors), adapter(tmp_path, pair, **settings))
        close(found.read(name), twin(tensors[name], a, b, scale), np.float32)


def test_conv_keeps_inputs_first(tmp_path):
    """A weight [I, O] gets the transpose; a square one follows the others."""
    square = "model.layers.0.o_proj"
    pair, other = factors(Q, 4, 6), factors(square, 4, 4, seed=2)
    tensors = base()  # q_proj [6, 4] is [I, O] now
    for settings in ({"fan_in_fan_out": True}, {}):
        found = with_lora(
            checkpoint(tensors), adapter(tmp_path, pair | other, **settings)
        )
        for module, made in ((Q, pair), (square, other)):
            a, b = made.values()
            weight = tensors[f"{module}.weight"]
            close(found.read(f"{module}.weight"), twin(weight.T, a, b, 1.5).T, "f4")
    a, b = other.values()
    weight = tensors[f"{square}.weight"]
    for fan, right in ((True, twin(weight.T, a, b, 1.5).T), (False, None)):
        right = twin(weight, a, b, 1.5) if right is None else right
        folder = adapter(tmp_path, other, fan_in_fan_out=fan)
        close(
            with_lora(checkpoint(tensors), folder).read(f"{square}.weight"), right, "f4"
        )


def test_embedding_and_what_replaces_a_tensor(tmp_path):
    """The embedding that the adapter brings along, then W + s (B A)^T."""
    draw = rng(3)
    a, b = draw.normal(size=(2, 9)), draw.normal(size=(4, 2))
    own, bias = draw.normal(size=(9, 4)), draw.normal(size=6)
    made = {
        f"{EMBED}.lora_embedding_A": a,
        f"{EMBED}.lora_embedding_B": b,
        f"{EMBED}.base_layer.weight": own,
        "lm_head.modules_to_save.weight": own,
        f"{Q}.base_layer.bias": bias,
    }
    made = {name: x.astype(np.float32) for name, x in made.items()}
    settings = {"bias": "all", "modules_to_save": ["lm_head"]}
    found = with_lora(checkpoint(base(BF16)), adapter(tmp_path, made, **settings))
    own, bias = own.astype(np.float32).astype(BF16), bias.astype(np.float32)
    close(found.read(f"{EMBED}.weight"), twin(own.T, a, b, 1.5).T, BF16)
    np.testing.assert_array_equal(found.read("lm_head.weight"), own)
    np.testing.assert_array_equal(found.read(f"{Q}.bias"), bias.astype(BF16))


def test_bias_of_b(tmp_path):
    """A bias of B is scaled too."""
    shift = rng(4).normal(size=6).astype(np.float32)
    made = {**factors(Q, 6, 4), f"{Q}.lora_B.bias": shift}
    tensors = base()
    found = with_lora(checkpoint(tensors), adapter(tmp_path, made, lora_bias=True))
    reference = tensors[f"{Q}.bias"] + 1.5 * shift.astype(np.float64)
    close(found.read(f"{Q}.bias"), reference, np.float32)


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("flip", [False, True])
def test_dora(tmp_path, flip, suffix):
    """Rows have the lengths that the adapter says, in the direction of W + s B A."""
    sizes = (4, 6) if flip else (6, 4)
    pair = factors(Q, *sizes)
    a, b = pair.values()
    lengths = rng(5).uniform(1, 2, sizes[0]).astype(np.float32)
    made = {**pair, f"{Q}.lora_magnitude_vector{suffix}": lengths}
    weight = base()[f"{Q}.weight"]
    found = with_lora(checkpoint(base()), adapter(tmp_path, made, use_dora=True))
    array = found.read(f"{Q}.weight")
    total = twin(weight.T if flip else weight, a, b, 1.5)
    total *= (lengths / np.sqrt((total**2).sum(1)))[:, None]
    close(array, total.T if flip else total, np.float32)


def test_names_without_the_first_word(tmp_path):
    """The base may lack the head's prefix, or have one that the adapter lacks."""
    name, pair = f"{Q}.weight", factors(Q, 6, 4)
    weight = base()[name]
    right = with_lora(checkpoint({name: weight}), adapter(tmp_path, pair)).read(name)
    for known in (name.removeprefix("model."), f"transformer.{name}"):
        found = with_lora(checkpoint({known: weight}), tmp_path)
        np.testing.assert_array_equal(found.read(known), right)


def test_two_adapters(tmp_path):
    """A view of a view: one after the other."""
    tensors = base()
    first, second = factors(Q, 6, 4), factors(Q, 6, 4, seed=7)
    once = with_lora(checkpoint(tensors), adapter(tmp_path / "1", first))
    both = with_lora(once, adapter(tmp_path / "2", second))
    reference = twin(tensors[f"{Q}.weight"], *first.values(), 1.5)
    close(both.read(f"{Q}.weight"), twin(reference, *second.values(), 1.5), "f4")


REFUSED = (  # settings, tensors, what the error says
    ({"peft_type": "IA3"}, {}, "'IA3'"),
    ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
    ({"target_parameters": ["experts"]}, {}, "target_parameters"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    ({"use_qalora": True}, {}, "use_qalora"),
    ({"ensure_weight_tying": True}, {}, "ensure_weight_tying"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4.*convert"),
    ({"init_lora_weights": "loftq"}, {}, "loftq"),
    ({}, {}, "without tensors"),
    ({}, {"a.lora_A.weight": (2, 4)}, "only lora_A"),
    ({}, factors("model.layers.0.k_proj", 6, 4), "closest there is"),
    ({}, factors("lm_heat", 9, 4), r"closest there is lm_head\.weight"),
    ({}, factors("embed_out", 9, 4), "tied"),
    ({}, factors(Q, 6, 5), r"\[6, 5\].*\[6, 4\].*another base"),
    ({}, factors(Q, 6, 4, rank=3), "rank 3"),
    ({"r": 3}, factors(Q, 6, 4), "rank 2"),
    ({}, {**factors(Q, 6, 4), f"{Q}.lora_magnitude_vector": (6,)}, "use_dora"),
    ({"use_dora": True}, factors(Q, 6, 4), "no lora_magnitude_vector"),
    ({}, {f"{Q}.lora_A.other.weight": (2, 4)}, "neither"),
    ({}, {f"{Q}.lora_C": (2, 4)}, "neither"),
    ({}, {"lm_head.weight": (10, 4)}, r"\[10, 4\].*another base"),
    ({}, {f"{Q}.lora_A.weight": (2, 4), f"{Q}.lora_B.weight": (6, 3)}, r"\[R, I\]"),
)


@pytest.mark.parametrize(("settings", "tensors", "message"), REFUSED)
def test_refused_by_name(tmp_path, settings, tensors, message):
    """One line before anything is read."""
    made = {
        name: np.ones(x, np.float32) if isinstance(x, tuple) else x
        for name, x in tensors.items()
    }
    folder = adapter(tmp_path, made, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        with_lora(checkpoint(base()), folder)
    assert "\n" not in str(caught.value)


def test_other_damage(tmp_path):
    """Quantised numbers, names of no model, files that are missing or broken."""
    numbers = {f"{Q}.weight": np.ones((6, 4), np.int8)}
    folder = adapter(tmp_path, factors(Q, 6, 4))
    with pytest.raises(ValueError, match="quantised"):
        with_lora(checkpoint(numbers), folder)
    path = tmp_path / "adapter_model.safetensors"
    x = Layout(np.dtype(np.float32), (1,))
    write(path, {"q.weight": x}, [np.ones(1, np.float32)])
    with pytest.raises(ValueError, match=r"base_model\.model"):
        with_lora(checkpoint(base()), folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin"):
        with_lora(checkpoint(base()), folder)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="peft_type"):
        with_lora(checkpoint(base()), folder)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        with_lora(checkpoint(base()), folder)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        with_lora(checkpoint(base()), folder)
