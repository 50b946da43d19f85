"""`collab-jax inspect` on small folders: findings, numbers, JSON, the plot."""

import importlib.util
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from command_line import refused, run
from merge_models import ROWS, WIDTH, llama

from collab_jax.io.safetensors import Layout, open_folder, write_folder
from collab_jax.io.safetensors import write as write_tensors

CONFIG = {
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TENSORS = 3 + 3 * 9
FIELDS = {
    "models", "base", "sources", "base_given", "findings", "not_finite", "equal",
    "not_compared", "total", "rows", "ranks", "verdict", "seconds",
}  # fmt: skip


def write(folder, arrays, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    layouts = {name: Layout(x.dtype, x.shape) for name, x in arrays.items()}
    write_folder(folder, layouts, list(arrays.values()), 10**9)
    return folder


def arrays(seed, shapes=None, like=None, by=0.01, dtype=np.float32):
    """A model, or one that moved away from another."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, shape in (shapes or llama()).items():
        x = draw.standard_normal(shape)
        made[name] = (x if like is None else like[name] + by * x).astype(dtype)
    return made


@pytest.fixture
def folders(tmp_path):
    base = arrays(0)
    models = {"base": base, "b": arrays(1, like=base), "c": arrays(2, like=base)}
    return {name: write(tmp_path / name, x) for name, x in models.items()}


def as_json(*arguments):
    result = run("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.exception or result.output
    return json.loads(result.stdout)


def test_json(folders):
    found = as_json(folders["b"], folders["c"], "--base", folders["base"])
    assert set(found) == FIELDS
    assert (found["base"], found["models"]) == ("base", ["b", "c"])
    assert found["base_given"]
    assert found["findings"] == found["not_finite"] == found["not_compared"] == []
    assert found["equal"] == {"b": [], "c": []}
    assert [row["name"] for row in found["rows"]] == [
        "embedding", "layer 0", "layer 1", "layer 2", "last norm", "head"
    ]  # fmt: skip
    total = found["total"]
    assert total["tensors"] == TENSORS == sum(row["tensors"] for row in found["rows"])
    read = {name: open_folder(folder) for name, folder in folders.items()}
    flat = {
        name: np.concatenate([c.read(n).ravel() for n in c.layouts]).astype(float)
        for name, c in read.items()
    }
    one, two = flat["b"] - flat["base"], flat["c"] - flat["base"]
    norms = np.linalg.norm(one), np.linalg.norm(two)
    assert total["norm"] == pytest.approx(norms, rel=1e-5)
    relative = np.array(norms) / np.linalg.norm(flat["base"])
    assert total["relative"] == pytest.approx(relative, rel=1e-5)
    assert total["cosine"][0][1] == pytest.approx(one @ two / np.prod(norms), abs=1e-5)
    assert total["entries"] == one.size
    assert found["ranks"]
    assert all(len(rank["effective"]) == 2 for rank in found["ranks"])
    assert "nearly orthogonal" in " ".join(found["verdict"])


def test_rows_of_modules_and_tensors(folders):
    by = {
        name: as_json(*folders.values(), "--by", name, "--ranks", "none")
        for name in ("module", "tensor")
    }
    rows = {row["name"]: row for row in by["module"]["rows"]}
    assert rows["self_attn.q_proj.weight"]["tensors"] == 3
    assert len(by["tensor"]["rows"]) == TENSORS
    assert by["tensor"]["ranks"] == []
    assert by["tensor"]["total"]["effective_rank"] is None
    assert by["module"]["total"] == by["tensor"]["total"]
    every = as_json(*folders.values(), "--ranks", "all")["ranks"]
    assert len(every) == 2 + 3 * 7


def test_table(folders):
    result = run("inspect", *folders.values(), "--base", folders["base"])
    assert result.exit_code == 2  # the base is no expert
    result = run("inspect", folders["b"], folders["c"], "--base", folders["base"])
    assert result.exit_code == 0, result.output
    for text in ("layer 2", "cosine", "rank", "verdict", "30 tensors of 604 param"):
        assert text in result.stdout, text
    assert "findings" not in result.stdout
    short = run("inspect", folders["b"], folders["c"], "--limit", 4, "--by", "tensor")
    assert "26 rows that moved less are left out" in short.stdout
    short = run("inspect", folders["b"], folders["c"], "--limit", 5)
    assert "layers 0-1" in short.stdout


def test_without_a_base_the_first_is_it(folders):
    found = as_json(folders["base"], folders["b"])
    assert not found["base_given"]
    assert found["models"] == ["b"]
    assert found["total"]["conflict"] is None
    assert 0.99 < found["total"]["weight_cosine"][0][1] < 1
    text = run("inspect", folders["base"], folders["b"]).stdout
    assert "the first model, as none was named" in text
    assert "cosines of the weights themselves: b and base" in text
    pair = as_json(folders["b"], "--base", folders["base"])
    assert pair["total"] == found["total"]


def test_an_adapter_moves_what_it_says(folders, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    settings |= {"target_modules": ["q_proj"], "base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    one = np.arange(1, WIDTH + 1, dtype=np.float32)
    factors = {f"{at}.lora_A.weight": one[None], f"{at}.lora_B.weight": one[:, None]}
    layouts = {name: Layout(x.dtype, x.shape) for name, x in factors.items()}
    file = adapter / "adapter_model.safetensors"
    write_tensors(file, layouts, list(factors.values()))
    reference = f"{folders['base']}+{adapter}"
    found = as_json(reference, "--base", folders["base"], "--ranks", "all")
    assert found["models"] == ["base+adapter"]
    assert len(found["equal"]["base+adapter"]) == TENSORS - 1
    assert found["total"]["norm"] == pytest.approx([one @ one], rel=1e-5)
    (rank,) = [r for r in found["ranks"] if "layers.1.self_attn.q_proj" in r["tensor"]]
    assert rank["effective"] == pytest.approx([1], abs=0.01)
    assert rank["stable"] == pytest.approx([1], abs=0.01)


def test_what_is_not_finite_is_named(folders):
    broken = open_folder(folders["c"])
    held = {name: broken.read(name).copy() for name in broken.layouts}
    name = "model.layers.1.mlp.up_proj.weight"
    held[name][3, 2] = np.nan
    held["model.norm.weight"][1] = -np.inf
    del broken
    shutil.rmtree(folders["c"])
    write(folders["c"], held)
    found = as_json(folders["b"], folders["c"], "--base", folders["base"])
    assert found["not_finite"] == [
        {"model": "c", "tensor": name, "entries": 1, "first": [3, 2], "value": "nan"},
        {"model": "c", "tensor": "model.norm.weight", "entries": 1, "first": [1],
         "value": "-inf"},
    ]  # fmt: skip
    assert "c holds 2 numbers that are not finite" in found["verdict"][0]
    assert found["total"]["cosine"][0][1] is not None


def test_equal_tensors_are_told(folders, tmp_path):
    base = open_folder(folders["base"])
    held = {name: base.read(name).copy() for name in base.layouts}
    held["model.norm.weight"] += 1
    write(tmp_path / "d", held)
    found = as_json(folders["b"], tmp_path / "d", "--base", folders["base"])
    assert len(found["equal"]["d"]) == TENSORS - 1
    assert found["equal"]["b"] == []
    copy = shutil.copytree(folders["base"], tmp_path / "copy")
    text = run("inspect", folders["base"], copy)
    assert "copy equals base in every tensor" in text.stdout
    assert text.exit_code == 0


def test_mismatches_are_findings(folders, tmp_path):
    shapes = llama(rows=ROWS + 2)
    del shapes["model.layers.2.mlp.up_proj.weight"]
    rope = {"rope_theta": 5e5, "num_attention_heads": 4, "vocab_size": ROWS + 2}
    write(tmp_path / "d", arrays(3, shapes, dtype=ml_dtypes.bfloat16), **rope)
    found = as_json(folders["b"], tmp_path / "d", "--base", folders["base"])
    text = "\n".join(found["findings"])
    for part in (
        "wrong: rope_theta: base 10000.0, d 500000.0",
        "wrong: num_attention_heads: base 2, d 4",
        f"wrong: vocab_size: base {ROWS}, d {ROWS + 2}",
        "wrong: tensors: d lacks model.layers.2.mlp.up_proj.weight",
        f"base [{ROWS}, {WIDTH}], d [{ROWS + 2}, {WIDTH}] and 1 more",
        "suspicious: stored type: base float32, b float32, d bfloat16",
    ):
        assert part in text, part
    wrong = [line.startswith("wrong") for line in found["findings"]]
    assert wrong == sorted(wrong, reverse=True)
    assert len(found["not_compared"]) == 3
    verdict = " ".join(found["verdict"])
    assert "set tokenizer: {source: union}" in verdict
    assert "differ in num_attention_heads" in verdict
    assert "Above 50% (d)" in verdict
    # the control: without the differences, none of it is said
    assert as_json(folders["b"], folders["c"])["findings"] == []


def test_tokenizers_that_differ_are_read(tmp_path, tiny):
    one = shutil.copytree(tiny, tmp_path / "one")
    two = shutil.copytree(tiny, tmp_path / "two")
    assert as_json(one, two)["findings"] == []
    path = two / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(raw), "utf-8")
    (line,) = as_json(one, two)["findings"]
    assert line.startswith("wrong: token ids: one 'a' is")
    assert "2 tokens have other ids" in line


def test_models_without_common_tensors(folders, tmp_path):
    write(tmp_path / "d", {"other": np.ones(3, np.float32)})
    found = as_json(folders["b"], tmp_path / "d")
    assert found["total"] is None
    assert found["rows"] == []
    assert "cannot be merged" in found["verdict"][0]
    assert run("inspect", folders["b"], tmp_path / "d").exit_code == 0


def test_misuse_is_one_line(folders, tmp_path):
    assert "two are expected" in refused("inspect", folders["b"])
    assert "named twice" in refused("inspect", folders["b"], folders["b"])
    assert "does not exist" in refused("inspect", folders["b"], tmp_path / "no/su/ch")
    weights = folders["c"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors" in refused("inspect", folders["b"], folders["c"])
    plot = refused("inspect", folders["base"], folders["b"], "--plot", "layers.gif")
    assert ".png, .pdf or .svg" in plot
    lost = tmp_path / "no" / "layers.png"
    assert "no folder" in refused("inspect", *folders.values(), "--plot", lost)


def test_plot_names_the_extra(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused("inspect", *folders.values(), "--plot", tmp_path / "a.png")
    assert "pip install 'collab-jax[plot]'" in line


@pytest.mark.parametrize("count", [1, 2, 5])
def test_plot(tmp_path, count):
    pytest.importorskip("matplotlib")
    base = arrays(0)
    write(tmp_path / "base", base)
    names = [tmp_path / f"m{n}" for n in range(count)]
    for n, name in enumerate(names):
        write(name, arrays(n + 1, like=base, by=0.01 * (n + 1)))
    out = tmp_path / "layers.png"
    result = run("inspect", *names, "--base", tmp_path / "base", "--plot", out)
    assert result.exit_code == 0, result.output
    assert f"plot: {out}" in result.stdout
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert out.stat().st_size > 10_000


def test_help_is_quick():
    check = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from collab_jax.cli import cli\n"
        "page = CliRunner().invoke(cli, ['inspect', '--help']).output\n"
        "assert 'collab-jax inspect ./code ./math' in page, page\n"
        "sys.exit(', '.join({'jax', 'numpy', 'rich'} & set(sys.modules)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
