"""The command line in the test's process, and a model small enough for it."""

import json

import jax
import numpy as np
from click.testing import CliRunner
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collab_jax import tree
from collab_jax.cli import cli
from collab_jax.io.names import rules
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def generate(*arguments):
    """The JSON of a run that went well."""
    result = run("generate", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line of a run that did not."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    lines = result.stderr.strip().split("\n")
    assert lines[-1].startswith("collab-jax: ")
    assert "Traceback" not in result.stderr
    # the plan may have been told before
    assert all(line.startswith("plan: ") for line in lines[:-1])
    return lines[-1]


def write_model(folder):
    """A folder in the Hugging Face layout: one layer, a vocabulary of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    config = from_hf(raw)
    # large enough, so that the greedy path is far from ties
    params = jax.tree.map(
        lambda x: 1.5 * np.asarray(x), init(jax.random.key(0), config)
    )
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    tensors = {}
    for rule in rules(config):
        arrays = rule.save([leaves["/".join(path)] for path in rule.paths])
        tensors |= dict(zip(rule.names, map(np.ascontiguousarray, arrays), strict=True))
    save_file(tensors, folder / "model.safetensors")
