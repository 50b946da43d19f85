"""GGUF files of every type against gguf-py's own values, and their error lines."""

import numpy as np
import pytest
from gguf import GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import llama_file

from collab_jax.io import gguf, gguf_names
from collab_jax.io.load import load, read_config

KINDS = ["Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"]


def stored(kind: GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """Bytes of a tensor; gguf-py cannot make blocks of K types, so those are random."""
    random = np.random.default_rng(0)
    values = random.normal(size=shape).astype(np.float32)
    try:
        return quants.quantize(values, kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        count = shape[0] * shape[1] // block
        blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
        scale = np.float16(0.01).view(np.uint16)
        halves = blocks.view(np.uint16)
        if kind == GGMLQuantizationType.Q6_K:
            halves[:, -1] = scale  # the scale of a block stands last, a finite number
        else:
            halves[:, :2] = scale  # scale and minimum stand first
        return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("name", KINDS)
def test_every_type_reads_as_gguf_py_dequantises(tmp_path, name):
    kind = GGMLQuantizationType[name]
    data = stored(kind, (5, 512))
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("first", np.float32([1]))
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = gguf.open_file(tmp_path / "a.gguf").checkpoint()
    found = checkpoint.read("x")
    expected = quants.dequantize(data, kind)
    assert found.shape == expected.shape == checkpoint.layouts["x"].shape == (5, 512)
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_rows_of_queries_and_keys_come_back_in_halves(tmp_path):
    path, checkpoint = llama_file(tmp_path, "llama")
    model = load(path)
    kernel = model.params["layers_0"]["attention"]["q"]["kernel"]
    expected = checkpoint["model.layers.0.self_attn.q_proj.weight"].T
    np.testing.assert_array_equal(kernel, expected)
    file = gguf.open_file(path)
    interleaved = file.checkpoint().read("blk.0.attn_q.weight").T
    assert np.abs(interleaved - expected).max() > 0.1  # not undone, it would show


def test_norms_of_gemma_lose_their_one(tmp_path):
    path, checkpoint = llama_file(tmp_path, "gemma3")
    model = load(path)
    for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", None)):
        theirs = theirs or "pre_feedforward_layernorm"
        scale = model.params["layers_0"][ours]["scale"]
        expected = checkpoint[f"model.layers.0.{theirs}.weight"]
        np.testing.assert_allclose(scale, expected, atol=1e-7)
    assert model.config.norm_offset == 1.0


def test_the_folder_of_a_file_is_made_once(tmp_path, monkeypatch):
    from collab_jax.io import hub

    path, _ = llama_file(tmp_path, "qwen2")
    folder = hub.fetch(path)
    assert read_config(folder).qkv_bias
    # a second conversion would fail
    monkeypatch.setattr("collab_jax.io.convert.describe", None)
    assert hub.fetch(path) == folder


def test_a_file_cut_off_anywhere_says_so(tmp_path):
    path, _ = llama_file(tmp_path, "llama")
    data = path.read_bytes()
    for size in [10, 30, 200, 700, len(data) // 2, len(data) - 40]:
        short = tmp_path / "short.gguf"
        short.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"has {size} bytes") as error:
            gguf.open_file(short)
        assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK" * 50)
    with pytest.raises(ValueError, match="no GGUF file"):
        gguf.open_file(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gguf.open_file(tmp_path / "b.gguf")


def test_unknown_type_and_architecture(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "rwkv7")
    writer.add_tensor("x", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"tensor x in .* has the type I32; known are"):
        gguf.open_file(tmp_path / "a.gguf")
    metadata = {"general.architecture": "rwkv7"}
    file = gguf.Gguf(tmp_path / "a.gguf", metadata, {})
    with pytest.raises(ValueError, match=r"unknown architecture 'rwkv7' .* gemma2"):
        gguf_names.config_dict(file)


def test_frequencies_of_llama_3_are_recognised(tmp_path):
    from collab_jax.models.rotary import Llama3

    length = 2 * np.pi * 1e4 ** (np.arange(4) / 4)
    smooth = np.clip((8192 / length - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    factors[-1] = max(factors[-1], 8.0)
    path, _ = llama_file(tmp_path, "llama", rope_freqs=factors, base=1e6)
    with pytest.raises(ValueError, match="rope_freqs that are not those of Llama 3"):
        load(path)
    length = 2 * np.pi * 1e6 ** (np.arange(4) / 4)
    smooth = np.clip((8192 / length - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    folder = tmp_path / "right"
    folder.mkdir()
    path, _ = llama_file(folder, "llama", rope_freqs=factors, base=1e6)
    assert isinstance(load(path).config.rotary[0].scaling, Llama3)
