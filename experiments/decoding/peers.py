"""Other programs on the same weights: transformers with torch, and llama.cpp."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decoding.ours import Subject, Timing

from collab_jax.io import canonical
from collab_jax.io.load import Model, save

Run = Callable[[Sequence[Sequence[int]]], Timing]
GGUF = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


class Torch:
    """Greedy generation by transformers, eager or compiled with a static cache."""

    def __init__(self, subject: Subject, dtype: str, compiled: bool, threads: int):
        """Loads the model; compiling happens at the first call of a shape."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            place = save(subject.model, Path(folder) / "model")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=getattr(torch, dtype)
            ).eval()
        self.new, self.options = subject.new, {}
        self.model.generation_config.eos_token_id = None
        if compiled:
            self.options = {"cache_implementation": "static"}
            self.model.forward = torch.compile(self.model.forward)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Timing:
        """Generates one token, then all; the difference is what decoding costs."""
        import torch

        tokens = torch.tensor(np.array(prompts))
        seconds = []
        for new in (1, 1 + self.new):
            begin = time.perf_counter()
            with torch.no_grad():
                out = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=new,
                    pad_token_id=0,
                    **self.options,
                )
            seconds.append(time.perf_counter() - begin)
        found = out[:, tokens.shape[1] :].tolist()
        return Timing(seconds[0], seconds[1] - seconds[0], found)


class Llama:
    """Greedy generation by llama.cpp, one text at a time."""

    def __init__(self, subject: Subject, kind: str, threads: int):
        """Writes the file, and opens it."""
        import llama_cpp

        self.new, self.folder = subject.new, tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / f"{kind}.gguf"
        assert subject.model is not None
        write_gguf(subject.model, path, kind)
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=subject.length + subject.new + 8,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Timing:
        """Generates; a batch is refused."""
        (prompt,) = prompts
        self.model.reset()  # or it would find the prompt of the last call in its cache
        begin = time.perf_counter()
        found, made = [], self.model.generate(list(prompt), top_k=1, temp=0.0)
        for token in made:
            if not found:
                middle = time.perf_counter()
            found.append(int(token))
            if len(found) > self.new:
                break
        return Timing(middle - begin, time.perf_counter() - middle, [found])


def write_gguf(model: Model, path: Path, kind: str) -> None:
    """Writes a Llama as llama.cpp's converter would: names, and rows of q and k."""
    import gguf

    config, quantised = model.config, gguf.GGMLQuantizationType[GGUF[kind]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_layer_norm_rms_eps(config.eps)
    rotary = config.rotary[0]
    assert rotary is not None
    writer.add_rope_freq_base(rotary.base)
    _add_tokens(writer, model)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    for name, leaf in canonical.to_checkpoint(config, model.params).items():
        stem, _, end = name.rpartition(".")
        tensor = np.asarray(leaf, np.float32)
        if count := heads.get(stem.rpartition(".")[2]):
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        own = quantised if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), own)
        writer.add_tensor(f"{table.get_name(stem)}.{end}", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: Any, model: Model) -> None:
    """The byte-level tokenizer; its texts do not matter here, but a file needs one."""
    import json

    whole = json.loads(model.tokenizer.backend_tokenizer.to_str())
    names = {number: name for name, number in whole["model"]["vocab"].items()}
    names |= {extra["id"]: extra["content"] for extra in whole["added_tokens"]}
    special = {extra["id"] for extra in whole["added_tokens"]}
    count = model.config.vocab
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names.get(i, f"[unused {i}]") for i in range(count)])
    writer.add_token_types([3 if i in special else 1 for i in range(count)])
    pairs = whole["model"]["merges"]
    writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in pairs])
    writer.add_eos_token_id(model.config.eos[0])
    writer.add_bos_token_id(model.config.bos or 0)


def all_of(subject: Subject, threads: int) -> dict[str, tuple[Callable[[], Run], int]]:
    """What is installed: how to make each, and the widest batch it takes."""
    found: dict[str, tuple[Callable[[], Run], int]] = {}
    if subject.model is None:
        return found
    if has("torch"):
        for dtype in ("float32", "bfloat16"):
            for compiled in (False, True):
                name = f"transformers {dtype} {'compiled' if compiled else 'eager'}"
                found[name] = (
                    lambda dtype=dtype, compiled=compiled: Torch(
                        subject, dtype, compiled, threads
                    ),
                    32,
                )
    if has("llama_cpp") and not subject.model.config.head_norm:  # a Llama
        for kind in GGUF:
            found[f"llama.cpp {kind}"] = (
                lambda kind=kind: Llama(subject, kind, threads),
                1,
            )
    return found
