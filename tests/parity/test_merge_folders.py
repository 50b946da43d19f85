"""Merges of folders in other forms against mergekit 0.1.5: what is around the tensors.

Experts, several documents, vocabularies, adapters, shards and pickles, modules, and a
real model.
"""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tokenizers as small

import collab_jax
from collab_jax import decode
from collab_jax.io import hub
from collab_jax.io.safetensors import Layout, open_folder, write_folder
from collab_jax.merge import files

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's imports

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from mergekit.merge_methods import api
    from mergekit.scripts import multimerge

    from parity import merge_checkpoints as made

FAMILIES = ("llama", "tied", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """A folder with three fine-tunes of every family; tests run inside it."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        for seed in range(3):
            made.write(folder / f"{name}{seed}", made.family(name), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family, tmp_path):
    """The same model; mergekit joins the experts of a layer, here files stay."""
    text = f"""
        merge_method: task_arithmetic
        base_model: {family}0
        {made.MODELS.replace("NAME", family)}
        parameters: {{weight: [0.5, 0.9], lambda: {{filter: gate.w, value: 2}}}}
        """
    recipe = files.prepare(text)
    assert not files.run(recipe, tmp_path / "ours")
    made.mergekit(text, tmp_path / "theirs")
    assert set(open_folder(tmp_path / "ours").layouts) == set(
        open_folder(f"{family}0").layouts
    )
    ours, theirs = (
        made.load(tmp_path / name).state_dict() for name in ("ours", "theirs")
    )
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    made.check_loads(tmp_path / "ours")


def test_experts_by_thresholds(tmp_path):
    """Each expert's own threshold, as mergekit has it for tensors on their own."""
    text = f"""
        merge_method: ties
        base_model: mixtral0
        {made.MODELS.replace("NAME", "mixtral")}
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
    made.compare(tmp_path, {})
    made.check_config(tmp_path)
    made.check_loads(tmp_path / "ours")
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
    made.check_config(tmp_path)
    made.check_loads(tmp_path / "ours")


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
    made.check(text, tmp_path, lora_merge_cache=str(tmp_path / "cache"))
    made.check_loads(tmp_path / "ours")


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
    made.compare(tmp_path, made.inputs(recipe))
    made.check_loads(tmp_path / "ours")


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
    made.check(text, tmp_path)
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert model.config.num_layers == 3


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
            return (x + 0.05 * x.std() * noise).astype(made.BF16)

        layouts = {n: Layout(made.BF16, x.shape) for n, x in source.layouts.items()}
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
        made.compare(tmp_path, {})
    theirs = made.load(tmp_path / "ours").to(torch.float32)
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
