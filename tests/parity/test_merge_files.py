"""Whole merges of small checkpoints against mergekit 0.1.5: every tensor, and config.

Both are run on the same folders, made with torch transformers; what is written must
also load there without a tensor missing or left over.
"""

import types
import warnings
import zlib
from unittest import mock

import jax
import numpy as np
import pytest

from collab_jax.merge import files, noise

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    from parity import merge_checkpoints as made


FAMILIES = ("llama", "tied", "qwen2", "gemma2", "gpt2")


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
        {made.MODELS.replace("NAME", "gemma2")}
        parameters:
          weight: [0.5, 2]
          nuslerp_flatten: [{{filter: mlp, value: false}}, {{value: true}}]
        """,
    "multislerp": f"""
        merge_method: multislerp
        base_model: gpt20
        {made.MODELS.replace("NAME", "gpt2")}
        parameters: {{weight: [0.5, 2]}}
        """,
    "karcher": """
        merge_method: karcher
        models: [{model: gpt20}, {model: gpt21}, {model: gpt22}]
        """,
    "task arithmetic": f"""
        merge_method: task_arithmetic
        base_model: gemma20
        {made.MODELS.replace("NAME", "gemma2")}
        parameters: {{weight: [0.5, -2], lambda: 0.3}}
        """,
    "breadcrumbs": f"""
        merge_method: breadcrumbs_ties
        base_model: gpt20
        {made.MODELS.replace("NAME", "gpt2")}
        parameters: {{weight: 0.5, density: [0.5, 0.9], gamma: [0.01, 0.1]}}
        """,
    "sce": f"""
        merge_method: sce
        base_model: qwen20
        {made.MODELS.replace("NAME", "qwen2")}
        parameters: {{select_topk: [0.1, 0.7]}}
        """,
    "ram": f"""
        merge_method: ram
        base_model: qwen20
        {made.MODELS.replace("NAME", "qwen2")}
        """,
    "ramplus": f"""
        merge_method: ramplus_tl
        base_model: qwen20
        {made.MODELS.replace("NAME", "qwen2")}
        """,
    "model stock": f"""
        merge_method: model_stock
        base_model: tied0
        {made.MODELS.replace("NAME", "tied")}
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
    "types": """
        merge_method: linear
        models: [{model: llama0}, {model: llama2}]
        parameters: {weight: [1, 0.25]}
        out_dtype: bfloat16
        """,
    "half precision": """
        merge_method: linear
        models: [{model: half0}, {model: half1}, {model: half2}]
        parameters: {weight: [0.7, 0.25]}
        """,
    "half precision on a sphere": """
        merge_method: slerp
        base_model: half1
        models: [{model: half0}, {model: half1}]
        parameters: {t: [0.1, 0.9]}
        dtype: bfloat16
        """,
}


@pytest.mark.parametrize("name", CASES)
def test_merges_are_mergekits(name, tmp_path):
    made.check(CASES[name], tmp_path)
    made.check_config(tmp_path)
    made.check_loads(tmp_path / "ours")


MASKED = """
merge_method: METHOD
base_model: gpt20
models:
- {model: gpt21, parameters: {weight: 0.5, density: 0.4}}
- {model: gpt22, parameters: {weight: [1, -0.5], density: [0.3, 0.8]}}
parameters: {lambda: 1.2}
"""


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della"])
def test_masks_in_its_place(method, tmp_path):
    """mergekit with the masks that a seed gives here, tensor by tensor."""
    now = {}
    plain = ExecuteMergeMethodTask.execute

    def execute(self, *args, **kwargs):
        now.update(name=self.output_weight.name, count=0)
        return plain(self, *args, **kwargs)

    def bernoulli(p):
        key = noise.fold_in(
            jax.random.key(0), np.uint32(zlib.crc32(now["name"].encode()))
        )
        key = noise.fold_in(noise.fold_in(key, 0), now["count"])
        now["count"] += 1
        shares = p.numpy().astype(np.float32).reshape(-1)
        mask = np.array(noise.bernoulli(key, shares, shares.shape))
        return torch.tensor(mask).reshape(p.shape).to(p.dtype)

    names = {name: getattr(torch, name) for name in dir(torch)}
    fake = types.SimpleNamespace(**names | {"bernoulli": bernoulli})
    with (
        mock.patch.object(ExecuteMergeMethodTask, "execute", execute),
        mock.patch("mergekit.sparsify.torch", fake),
    ):
        made.check(MASKED.replace("METHOD", method), tmp_path)


def test_an_error_would_be_noticed(tmp_path):
    """Control: a weight that is off by a four thousandth of itself."""
    text = CASES["gradients, filters, precedence"]
    made.mergekit(text, tmp_path / "theirs")
    recipe = files.prepare(text.replace("value: 0.4", "value: 0.4001"))
    files.run(recipe, tmp_path / "ours")
    with pytest.raises(AssertionError):
        made.compare(tmp_path, made.inputs(recipe))
