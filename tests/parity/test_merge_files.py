"""Whole merges of small checkpoints against mergekit 0.1.5: every tensor, and config.

Both are run on the same folders, made with torch transformers; what is written must
also load there without a tensor missing or left over.
"""

import json
import shutil
import types
import warnings
import zlib
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import collab_jax
from collab_jax import decode
from collab_jax.io import hub
from collab_jax.io.safetensors import Layout, open_folder, write_folder
from collab_jax.merge import files, jobs, noise
from tests import small_tokenizers as small

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from mergekit.merge_methods import api
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.scripts import multimerge

    from tests.parity import merge_checkpoints as made


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
    check(CASES[name], tmp_path)
    check_config(tmp_path)
    check_loads(tmp_path / "ours")


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
        check(MASKED.replace("METHOD", method), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family, tmp_path):
    """The same model; mergekit joins the experts of a layer, here files stay."""
    text = f"""
        merge_method: task_arithmetic
        base_model: {family}0
        {MODELS.replace("NAME", family)}
        parameters: {{weight: [0.5, 0.9], lambda: {{filter: gate.w, value: 2}}}}
        """
    recipe = files.prepare(text)
    assert not files.run(recipe, tmp_path / "ours")
    made.mergekit(text, tmp_path / "theirs")
    assert set(open_folder(tmp_path / "ours").layouts) == set(
        open_folder(f"{family}0").layouts
    )
    ours, theirs = (load(tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    check_loads(tmp_path / "ours")


def test_experts_by_thresholds(tmp_path):
    """Each expert's own threshold, as mergekit has it for tensors on their own."""
    text = f"""
        merge_method: ties
        base_model: mixtral0
        {MODELS.replace("NAME", "mixtral")}
        parameters: {{weight: 0.5, density: 0.4}}
        """
    recipe = files.prepare(text)
    assert "each expert of a layer is merged on its own" in recipe.stages[0].notes[0]
    files.run(recipe, tmp_path / "ours")
    names = [name for name in open_folder("mixtral0").layouts if ".experts.1." in name]
    assert len(names) == 9
    for name in names:
        tensors = [
            torch.tensor(open_folder(f"mixtral{i}").read(name)) for i in range(3)
        ]
        expected = api.merge_tensors(
            tensors,
            "ties",
            parameters={"weight": 0.5, "density": 0.4},
            base_index=0,
        )
        found = torch.tensor(open_folder(tmp_path / "ours").read(name))
        bar = 1e-6 * (expected.abs() + torch.stack(tensors).abs().max(0).values)
        assert ((found - expected).abs() <= bar).all(), name


STAGES = """
name: first
merge_method: linear
models:
- {model: llama0, parameters: {weight: [0.2, 0.8]}}
- {model: llama1, parameters: {weight: 0.5}}
---
name: second
merge_method: passthrough
slices:
- sources: [{model: llama2, layer_range: [0, 2]}]
- sources: [{model: first, layer_range: [2, 3]}]
---
merge_method: ties
base_model: llama0
models:
- {model: first, parameters: {weight: 1, density: 0.5}}
- {model: second, parameters: {weight: 0.3, density: 0.9}}
"""


def test_stages(tmp_path):
    """Several documents are mergekit-multi's."""
    (tmp_path / "stages.yml").write_text(STAGES)
    arguments = ["stages.yml", "--out-path", "theirs", "-I", "between", "--quiet"]
    arguments += ["--no-write-model-card"]
    arguments[0] = str(tmp_path / arguments[0])
    arguments[2] = str(tmp_path / "theirs")
    arguments[4] = str(tmp_path / "between")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        multimerge.main(arguments, standalone_mode=False)
    files.run(files.prepare(STAGES), tmp_path / "ours")
    compare(tmp_path, {})
    check_config(tmp_path)
    check_loads(tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == ".") == []


@pytest.fixture(scope="module")
def tongues(places):
    """Models with tokenizers of their own."""
    for name, build in (("r", small.first), ("s", small.second), ("t", small.third)):
        tokenizer = build()
        config = made.family("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
        made.write(places / name, config, ord(name), tokenizer=tokenizer)


TOKENIZERS = {
    "union": "tokenizer_source: union",
    "base": "tokenizer_source: base",
    "a model": "tokenizer: {source: s}",
    "another model": "tokenizer: {source: ./t}",
    "rows": """tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    new: {source: {kind: model_token, model: s, token: cd}}
    zero: {source: {kind: zero}}
    x: {source: s, force: false}
    a: {source: r, force: true}
    b: {source: {kind: model_token, model: s, token_id: 3}, force: true}
""".replace("    x: {source: s, force: false}\n", ""),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, tongues, tmp_path):
    """The same rows for the same tokens; mergekit numbers some of them by chance."""
    text = f"""
merge_method: linear
base_model: r
models: [{{model: r}}, {{model: s}}]
parameters: {{weight: [0.4, 0.6]}}
chat_template: chatml
{TOKENIZERS[name]}
"""
    recipe = files.prepare(text)
    files.run(recipe, tmp_path / "ours")
    made.mergekit(text, tmp_path / "theirs")
    folders = tmp_path / "ours", tmp_path / "theirs"
    ours, theirs = map(open_folder, folders)
    first, second = map(transformers.AutoTokenizer.from_pretrained, folders)
    mine, its = first.get_vocab(), second.get_vocab()
    assert set(mine) == set(its)
    talk = [{"role": "user", "content": "a b"}]
    shown = [t.apply_chat_template(talk, tokenize=False) for t in (first, second)]
    assert shown[0] == shown[1]
    for tensor, layout in theirs.layouts.items():
        found, expected = ours.read(tensor), theirs.read(tensor)
        assert found.shape == layout.shape, tensor
        if tensor.endswith(("embed_tokens.weight", "lm_head.weight")):
            order = list(its)
            found = found[[mine[token] for token in order]]
            expected = expected[[its[token] for token in order]]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), tensor
    check_config(tmp_path)
    check_loads(tmp_path / "ours")


def test_an_adapter(places, tmp_path):
    """MODEL+ADAPTER, which mergekit has PEFT merge and store."""
    model = transformers.AutoModelForCausalLM.from_pretrained("llama0")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
    )
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    text = f"""
        merge_method: ties
        base_model: llama0
        models: [{{model: llama0+{tmp_path / "adapter"}}}, {{model: llama2}}]
        parameters: {{weight: 0.5, density: 0.5}}
        """
    check(text, tmp_path, lora_merge_cache=str(tmp_path / "cache"))
    check_loads(tmp_path / "ours")


def test_files_of_other_kinds(places, tmp_path):
    """Inputs in shards and as pickles; a result in shards."""
    model = transformers.AutoModelForCausalLM.from_pretrained("tied1")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    state = transformers.AutoModelForCausalLM.from_pretrained("tied2").state_dict()
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    shutil.copytree("tied2", tmp_path / "pickle")
    (tmp_path / "pickle/model.safetensors").unlink()
    torch.save(state, tmp_path / "pickle/pytorch_model.bin")
    text = f"""
        merge_method: linear
        models: [{{model: {tmp_path / "shards"}}}, {{model: {tmp_path / "pickle"}}}]
        parameters: {{weight: [0.3, 1]}}
        """
    recipe = files.prepare(text)
    files.run(recipe, tmp_path / "ours", max_shard_size=20_000)
    made.mergekit(text, tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    compare(tmp_path, inputs(recipe))
    check_loads(tmp_path / "ours")


def test_modules(places, tmp_path):
    """An encoder and a decoder, each with slices of its own."""
    common = {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_heads": 4}
    common |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    for seed in range(2):
        torch.manual_seed(seed)
        config = transformers.T5Config(**common, num_layers=2)
        transformers.T5ForConditionalGeneration(config).save_pretrained(f"t5{seed}")
        small.first().save_pretrained(f"t5{seed}")
    text = """
        merge_method: linear
        modules:
          shared: {models: [{model: t50}, {model: t51}]}
          encoder:
            slices:
            - sources:
              - {model: t50, layer_range: [0, 2]}
              - {model: t51, layer_range: [0, 2]}
            - sources:
              - {model: t50, layer_range: [1, 2]}
              - {model: t51, layer_range: [1, 2]}
            parameters: {weight: [1, 3]}
          decoder: {models: [{model: t50}, {model: t51, parameters: {weight: 0.2}}]}
        parameters: {weight: 0.5}
        """
    check(text, tmp_path)
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert model.config.num_layers == 3


def test_an_error_would_be_noticed(tmp_path):
    """Control: a weight that is off by a four thousandth of itself."""
    text = CASES["gradients, filters, precedence"]
    made.mergekit(text, tmp_path / "theirs")
    recipe = files.prepare(text.replace("value: 0.4", "value: 0.4001"))
    files.run(recipe, tmp_path / "ours")
    with pytest.raises(AssertionError):
        compare(tmp_path, inputs(recipe))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_smollm2(method, tmp_path):
    """A merge of a real model: mergekit's, and torch and we load it and agree."""
    start = hub.fetch("smollm2-135m-instruct")
    source = open_folder(start)
    for seed in range(2):
        shutil.copytree(start, tmp_path / f"m{seed}")
        for path in (tmp_path / f"m{seed}").glob("*.safetensors*"):
            path.unlink()
        draw = np.random.default_rng(seed)

        def moved(name, draw=draw):
            x = source.read(name).astype(np.float32)
            noise = draw.standard_normal(x.shape, np.float32)
            return (x + 0.05 * x.std() * noise).astype(BF16)

        layouts = {n: Layout(BF16, x.shape) for n, x in source.layouts.items()}
        write_folder(tmp_path / f"m{seed}", layouts, map(moved, layouts), 10**9)
    text = f"""
        merge_method: {method}
        base_model: {start}
        models: [{{model: {tmp_path / "m0"}}}, {{model: {tmp_path / "m1"}}}]
        parameters: {{weight: 0.5, density: 0.6}}
        dtype: bfloat16
        """.replace(f"base_model: {start}" * (method == "linear"), "")
    files.run(files.prepare(text), tmp_path / "ours")
    if method == "linear":
        made.mergekit(text, tmp_path / "theirs")
        compare(tmp_path, {})
    theirs = load(tmp_path / "ours").to(torch.float32)
    theirs.generation_config.eos_token_id = None  # always to the last token
    mine = collab_jax.load(tmp_path / "ours", dtype=jnp.float32)
    prompt = mine.tokenizer("The capital of France is").input_ids
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    padded = decode.pad([prompt])
    found = decode.run(
        decode.greedy(mine.lm, 12), mine.params, *padded, jax.random.key(0)
    )
    assert np.asarray(found.tokens)[0].tolist() == expected[0].tolist()
