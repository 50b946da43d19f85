"""Whole merges of small checkpoints against mergekit 0.1.5: every tensor, and config.

Both are run on the same folders, made with torch transformers; what is written must
also load there without a tensor missing or left over.
"""

import json
import types
import warnings
import zlib
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    from tests.parity import merge_checkpoints as made

from collab_jax.io.safetensors import open_folder
from collab_jax.merge import files, jobs, noise
from tests import small_tokenizers as small

BF16 = np.dtype(ml_dtypes.bfloat16)
FAMILIES = ("llama", "tied", "qwen2", "gemma2", "gpt2", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """A folder with three fine-tunes of every family; tests run inside it."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        for seed in range(3):
            made.write(folder / f"{name}{seed}", made.family(name), seed)
    for seed in range(3):
        config = made.family("llama")
        made.write(folder / f"half{seed}", config, seed, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


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
    made.mergekit(text, out / "theirs", **options)
    sizes = inputs(recipe) if sizes is None else sizes
    compare(out, sizes)
    return out


def compare(out, sizes, units=1.0):
    ours, theirs = open_folder(out / "ours"), open_folder(out / "theirs")
    assert set(ours.layouts) == set(theirs.layouts)
    for name, layout in theirs.layouts.items():
        assert ours.layouts[name] == layout, name
        found, expected = (x.read(name).astype(np.float64) for x in (ours, theirs))
        bar = 1e-6 * (np.abs(expected) + sizes.get(name, np.abs(expected).max()))
        if layout.dtype == BF16:
            last = 2.0 ** (np.frexp(np.where(expected == 0, 1e-30, expected))[1] - 8)
            bar = np.maximum(bar, units * last)
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
    dtypes = [config.get("dtype") or config.get("torch_dtype") for config in (ours, theirs)]
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


MODELS = "models: [{model: NAME1}, {model: NAME2}]"
CASES = {
    "gradients, filters, precedence": """
        merge_method: linear
        models:
        - model: llama0
          parameters:
            weight:
            - {filter: mlp, value: [0, 0.3, 1]}
            - {filter: norm, value: 2}
            - {value: 0.4}
        - {model: llama1, parameters: {weight: [1, 0.2]}}
        - {model: llama2}
        parameters: {weight: {filter: "*", value: 0.7}, normalize: [true, false]}
        dtype: float32
        """,
    "a base that is a source": """
        merge_method: linear
        base_model: qwen21
        models: [{model: qwen20, parameters: {weight: 0.3}}]
        parameters: {weight: 0.6, normalize: false}
        """,
    "ties": """
        merge_method: ties
        base_model: llama0
        models:
        - {model: llama0, parameters: {weight: 1, density: 0.1}}
        - {model: llama1, parameters: {weight: [0.5, 1], density: [0.2, 0.9, 0.4]}}
        - model: llama2
          parameters:
            weight: [{filter: self_attn, value: -0.3}, {value: 0.8}]
            density: {filter: mlp, value: 0.33}
        parameters:
          density: 0.6
          lambda: [{filter: down, value: 0.7}, {value: 1.3}]
          normalize: [true, false]
          int8_mask: true
        """,
    "slerp": """
        merge_method: slerp
        base_model: tied0
        models: [{model: tied0}, {model: tied1}]
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - value: 0.5
        """,
    "nuslerp": f"""
        merge_method: nuslerp
        {MODELS.replace("NAME", "gemma2")}
        parameters:
          weight: [0.5, 2]
          nuslerp_flatten: [{{filter: mlp, value: false}}, {{value: true}}]
        """,
    "multislerp": f"""
        merge_method: multislerp
        base_model: gpt20
        {MODELS.replace("NAME", "gpt2")}
        parameters: {{weight: [0.5, 2]}}
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: gpt20}, {model: gpt21}, {model: gpt22}]
        """,
    "task arithmetic": f"""
        merge_method: task_arithmetic
        base_model: gemma20
        {MODELS.replace("NAME", "gemma2")}
        parameters: {{weight: [0.5, -2], lambda: 0.3}}
        """,
    "breadcrumbs": f"""
        merge_method: breadcrumbs_ties
        base_model: gpt20
        {MODELS.replace("NAME", "gpt2")}
        parameters: {{weight: 0.5, density: [0.5, 0.9], gamma: [0.01, 0.1]}}
        """,
    "sce": f"""
        merge_method: sce
        base_model: qwen20
        {MODELS.replace("NAME", "qwen2")}
        parameters: {{select_topk: [0.1, 0.7]}}
        """,
    "ram": f"""
        merge_method: ram
        base_model: qwen20
        {MODELS.replace("NAME", "qwen2")}
        """,
    "ramplus": f"""
        merge_method: ramplus_tl
        base_model: qwen20
        {MODELS.replace("NAME", "qwen2")}
        """,
    "model stock": f"""
        merge_method: model_stock
        base_model: tied0
        {MODELS.replace("NAME", "tied")}
        parameters: {{filter_wise: [{{filter: mlp, value: true}}, {{value: false}}]}}
        """,
    "nearswap": """
        merge_method: nearswap
        base_model: gemma20
        models: [{model: gemma21}]
        parameters: {t: [0.01, 0.1]}
        """,
    "arcee fusion": """
        merge_method: arcee_fusion
        base_model: llama0
        models: [{model: llama1}]
        """,
    "stacked": """
        merge_method: passthrough
        slices:
        - sources: [{model: llama0, layer_range: [0, 2]}]
        - sources:
          - model: llama1
            layer_range: [1, 3]
            parameters:
              scale:
              - {filter: o_proj, value: 0}
              - {filter: down_proj, value: [0.5, 0.1]}
              - {value: 1}
        - sources: [{model: llama2, layer_range: [0, 3]}]
        """,
    "slices": """
        merge_method: ties
        base_model: gpt20
        slices:
        - sources:
          - {model: gpt20, layer_range: [0, 1]}
          - {model: gpt21, layer_range: [1, 2], parameters: {weight: 1}}
        - base_model: gpt22
          sources:
          - {model: gpt21, layer_range: [0, 2]}
          - {model: gpt22, layer_range: [0, 2]}
          parameters: {weight: {filter: c_fc, value: 3}}
        parameters: {weight: [0.5, 1], density: 0.5}
        """,
    "a module": """
        merge_method: linear
        modules:
          default:
            slices:
            - sources:
              - {model: tied0, layer_range: [1, 3], parameters: {weight: 1}}
              - {model: tied1, layer_range: [0, 2]}
            parameters: {weight: [0, 4]}
        """,
    "a head that one model ties": """
        merge_method: linear
        models:
        - {model: llama0, parameters: {weight: 1}}
        - {model: tied1, parameters: {weight: {filter: lm_head, value: 2}}}
        parameters: {weight: 3}
        """,
    "experts": """
        merge_method: linear
        models: [{model: llama0}, {model: llama2}]
        parameters: {weight: [1, 0.25]}
        out_dtype: bfloat16
        """,
}


@pytest.mark.parametrize("name", CASES)
def test_merges_are_mergekits(name, tmp_path):
    check(CASES[name], tmp_path)
    check_config(tmp_path)
    check_loads(tmp_path / "ours")
