"""What can go wrong in a merge: one line, status 2, no result, inputs untouched."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
import small_tokenizers as small
from command_line import run

from collab_jax.io import writer
from collab_jax.io.safetensors import Layout, open_folder, write_folder
from collab_jax.merge import files, sources

UP = "model.layers.1.mlp.up_proj.weight"
LINEAR = """
merge_method: linear
models:
- model: a
  parameters: {weight: 0.5}
- model: b
  parameters: {weight: 0.5}
dtype: float32
"""
SLICES = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 2]}]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        small.write_llama(folder / name, small.first(), seed)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A folder with two models, in which a test runs; reads are counted."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    reads = []
    plain = sources.open_weights

    def spied(folder):
        found = plain(folder)

        def read(name):
            reads.append(name)
            return found.read(name)

        return found._replace(read=read)

    monkeypatch.setattr(sources, "open_weights", spied)
    return reads


def digests(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(tmp_path, text, out="out"):
    """The one line of a merge that fails."""
    (tmp_path / "merge.yml").write_text(text)
    before = digests(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run("merge", "merge.yml", out)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("collab-jax: ")
    assert sum(line.startswith("collab-jax: ") for line in lines) == 1
    assert digests(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    return lines[-1].removeprefix("collab-jax: ")


def edit(folder, name, change):
    """Writes a model anew with one tensor changed; None removes it."""
    found = open_folder(folder)
    arrays = {n: np.array(found.read(n)) for n in found.layouts}
    arrays[name] = change(arrays[name])
    arrays = {n: a for n, a in arrays.items() if a is not None}
    (folder / "model.safetensors").unlink()
    layouts = {n: Layout(a.dtype, a.shape) for n, a in arrays.items()}
    write_folder(folder, layouts, arrays.values(), 10**9)


MISSPELT = {  # what is written instead, what is said
    "merge_method: linear": ("merge_methd: linear", "merge_methd: unknown key"),
    "linear": ("liner", "merge_method: unknown method 'liner'; did you mean linear"),
    "models:": ("modles:", "modles: unknown key 'modles'; did you mean modules or"),
    "- model: b": ("- modell: b", "models[1].modell: unknown key"),
    "parameters:": ("paramters:", "models[0].paramters: unknown key"),
    "weight": ("wieght", "models[0].parameters.wieght: unknown parameter"),
    "dtype:": ("dtpye:", "dtpye: unknown key 'dtpye'; did you mean dtype"),
    "float32": ("flaot32", "dtype: unknown type 'flaot32'; did you mean float32"),
    "dtype: float32": ("tokeniser_source: union", "tokeniser_source: unknown key"),
    "dtype: float32 ": ("chat_template: chatlm", "chat_template: unknown chat templ"),
    "dtype: float32  ": ("tokenizer: {sorce: union}", "tokenizer.sorce: unknown key"),
    "dtype: float32   ": ("tokenizer_source: c", "tokenizer: no folder, file or"),
}


@pytest.mark.parametrize("old", MISSPELT)
def test_misspelt(old, place, tmp_path):
    new, said = MISSPELT[old]
    line = refused(tmp_path, LINEAR.replace(old.strip(), new, 1))
    assert line.startswith(said), line
    assert not place


def test_misspelt_in_a_slice(place, tmp_path):
    line = refused(tmp_path, SLICES.replace("layer_range: [1", "layer_rnge: [1"))
    assert line.startswith("slices[1].sources[0]")
    assert "layer_range" in line
    assert not place


def test_no_yaml(place, tmp_path):
    assert refused(tmp_path, "a: [b").startswith("line 2, column ")
    assert refused(tmp_path, "").startswith("the configuration is empty")
    assert not place


EARLY = {
    "no folder": (
        lambda p: shutil.rmtree(p / "b"),
        "models[1].model: ",
    ),
    "no config": (
        lambda p: (p / "b/config.json").unlink(),
        "models[1].model: b/config.json is missing",
    ),
    "no weights": (
        lambda p: (p / "b/model.safetensors").unlink(),
        "models[1].model: b holds neither model.safetensors nor",
    ),
    "a missing tensor": (
        lambda p: edit(p / "b", UP, lambda x: None),
        f"models[1]: tensor {UP} is missing from b",
    ),
    "unequal shapes": (
        lambda p: edit(p / "b", UP, lambda x: x[:-1]),
        f"models[1]: {UP} is [11, 8] in b and [12, 8] in a",
    ),
    "unequal tokens": (
        lambda p: edit(p / "b", "lm_head.weight", lambda x: x[:-1]),
        "models[1]: lm_head.weight is [6, 8] in b and [7, 8] in a; set tokenizer",
    ),
    "a corrupt header": (
        lambda p: damage(p / "b/model.safetensors", lambda x: x[:9] + b"}" + x[10:]),
        "models[1].model: b/model.safetensors",
    ),
    "a header that is too long": (
        lambda p: damage(p / "b/model.safetensors", lambda x: b"\xff" * 8 + x[8:]),
        "models[1].model: b/model.safetensors",
    ),
    "a truncated file": (
        lambda p: damage(p / "b/model.safetensors", lambda x: x[:-1]),
        "models[1].model: b/model.safetensors",
    ),
    "an empty file": (
        lambda p: damage(p / "b/model.safetensors", lambda x: b""),
        "models[1].model: b/model.safetensors",
    ),
    "a damaged config": (
        lambda p: damage(p / "b/config.json", lambda x: x[:-3]),
        "models[1].model: b/config.json is not JSON",
    ),
    "a config that is a list": (
        lambda p: damage(p / "b/config.json", lambda x: b"[]"),
        "models[1].model: b/config.json",
    ),
    "a config that is no text": (
        lambda p: damage(p / "b/config.json", lambda x: b"\xff" + x),
        "models[1].model: b/config.json",
    ),
    "a damaged index": (
        lambda p: (
            (p / "b/model.safetensors").rename(p / "b/model-1.safetensors"),
            (p / "b/model.safetensors.index.json").write_text('{"weight_map": '),
        ),
        "models[1].model: b/model.safetensors.index.json",
    ),
    "a shard that is missing": (
        lambda p: (
            (p / "b/model.safetensors").rename(p / "b/model-1.safetensors"),
            (p / "b/model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"x": "model-2.safetensors"}})
            ),
        ),
        "models[1].model: ",
    ),
}


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", EARLY)
def test_before_the_first_tensor_is_read(name, place, tmp_path):
    change, said = EARLY[name]
    change(tmp_path)
    place.clear()
    line = refused(tmp_path, LINEAR)
    assert line.startswith(said), line
    assert not place


def test_weights_that_sum_to_zero(place, tmp_path):
    line = refused(tmp_path, LINEAR.replace("0.5", "-0.5", 1))
    assert "sum to 0" in line
    assert "tensor model." in line
    assert not place


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(broken, place, tmp_path):
    damage(tmp_path / "b" / broken, lambda x: x[: len(x) // 2])
    line = refused(tmp_path, LINEAR + "tokenizer: {source: union}\n")
    assert "b" in line.split() or line.startswith("b"), line
    assert not place


def test_a_missing_tokenizer(place, tmp_path):
    for path in (tmp_path / "b").glob("tokenizer*"):
        path.unlink()
    line = refused(tmp_path, LINEAR + "tokenizer: {source: union}\n")
    assert line.startswith("b: ")
    assert "tokenizer" in line
    assert not place


@pytest.mark.parametrize(
    ("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")]
)
def test_numbers_that_are_not_finite(bad, shown, place, tmp_path):
    def change(x):
        x[3, 2] = bad
        return x

    edit(tmp_path / "b", UP, change)
    line = refused(tmp_path, LINEAR)
    said = f"tensor {UP} of b ({UP}) holds 1 numbers that are not finite, the first "
    assert line.startswith(f"{said}{shown} at [3, 2]"), line


def test_a_result_that_is_not_finite(place, tmp_path):
    edit(tmp_path / "b", UP, lambda x: np.full_like(x, 3e38))
    text = LINEAR.replace("weight: 0.5", "weight: 2")
    text += "parameters: {normalize: false}\n"
    line = refused(tmp_path, text)
    said = f"tensor {UP} of the result holds 96 numbers that are not finite, the first"
    assert line.startswith(f"{said} inf at [0, 0]: finite inputs have gone beyond")


def test_where_the_result_cannot_be(place, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert "full is not empty" in refused(tmp_path, LINEAR, "full")
    assert "file" in refused(tmp_path, LINEAR, "file")
    assert "file" in refused(tmp_path, LINEAR, "file/out")
    assert "a is not empty" in refused(tmp_path, LINEAR, "a")
    assert not place


def test_no_name_for_the_result(place, tmp_path):
    (tmp_path / "merge.yml").write_text(LINEAR)
    result = run("merge", "merge.yml")
    assert result.exit_code == 2
    assert result.stderr.startswith("collab-jax: OUT is missing")


def test_a_full_disk(place, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(9, 8, 1))
    line = refused(tmp_path, LINEAR)
    assert "1 free" in line
    assert "make room" in line
    assert not place


def test_a_disk_that_fills_up(place, tmp_path, monkeypatch):
    plain, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*arguments)

    monkeypatch.setattr(writer.os, "pwrite", full)
    assert "make room" in refused(tmp_path, LINEAR)


def test_an_input_that_vanishes(place, tmp_path):
    """Nothing is left, nor are folders above the result that the run has made."""
    recipe = files.prepare(LINEAR)
    (tmp_path / "b/model.safetensors").unlink()
    for out in ("out", "x/y/out"):
        with pytest.raises(OSError, match=r"b/model\.safetensors"):
            files.run(recipe, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


LARGE = 1 << 22  # entries; six such tensors take longer than a look at the folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    layout = Layout(np.dtype(np.float16), (LARGE,))
    names = [f"model.layers.{i}.x.weight" for i in range(6)]
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        zeros = (np.zeros(LARGE, np.float16) for _ in names)
        write_folder(folder / name, dict.fromkeys(names, layout), zeros, 10**12)
    (folder / "merge.yml").write_text(LINEAR.replace("dtype: float32", ""))
    return folder


PROGRAMS = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}


def begun(folder):
    """A process that is in the midst of its writing, and its own folder."""
    command = [sys.executable, "-m", "collab_jax", "merge", "merge.yml", "out"]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | PROGRAMS,
    )
    end = time.monotonic() + 120
    while not (found := list(folder.glob(".out.*.partial/result/.model*"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)
    return process, found[0].parents[1]


def test_a_killed_merge(large, monkeypatch):
    """What it leaves is hidden; the next run takes it away, and not while it lives."""
    process, partial = begun(large)
    process.send_signal(signal.SIGSTOP)
    try:
        small_text = LINEAR.replace("dtype: float32", "")
        assert partial.exists()
        assert not (large / "out").exists()
        files._remove_stale(large / "out")
        assert partial.exists()
    finally:
        process.kill()
        process.communicate()
    assert not (large / "out").exists()
    held = [p.name for p in partial.rglob("*") if p.is_file()]
    assert not any(name.endswith(".safetensors") for name in held)
    monkeypatch.chdir(large)
    files.run(files.prepare(small_text), "out")
    left = sorted(path.name for path in large.iterdir())
    assert left == ["a", "b", "merge.yml", "out"]
    assert len(open_folder(large / "out").layouts) == 6
    shutil.rmtree(large / "out")


def test_an_interrupted_merge(large):
    process, _ = begun(large)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.strip().splitlines()[-1] == "collab-jax: interrupted"
    assert "Traceback" not in told
    assert sorted(p.name for p in large.iterdir()) == ["a", "b", "merge.yml"]
