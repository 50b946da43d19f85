"""Tokenizers of a dozen tokens, and folders of models that have them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIDTH, INNER, LAYERS = 8, 12, 2


def bpe(words, merges=(), **more):
    made = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [tuple(m.split()) for m in merges],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _finish(made, **more)


def unigram(words, **more):
    made = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _finish(made, **more)


def wordpiece(words, **more):
    made = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finish(made, **more)


def _finish(made, added=(), special=(), template=None, **names):
    made.add_tokens(list(added))
    made.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = template
    return tokenizer


def first():
    return bpe(
        ["a", "b", "ab", "c", "x"],
        ["a b"],
        special=["<s>", "</s>"],
        bos_token="<s>",
        eos_token="</s>",
        template="first {{ messages[0].content }}",
    )


def second():
    return bpe(
        ["b", "a", "c", "d", "cd", "ba"],
        ["c d", "b a"],
        added=["hello"],
        special=["<pad>", "</s>"],
        eos_token="</s>",
        pad_token="<pad>",
        template="second {{ messages[0].content }}",
    )


def third():
    return bpe(["q", "a", "b", "c", "d", "hey"], added=["hello", AddedToken("<s>")])


def fourth():
    """Ordinary tokens that others have added, and the other way round."""
    own = [AddedToken("a", lstrip=True), AddedToken("</s>", rstrip=True), "zz"]
    return bpe(["a", "hello", "q", "<s>"], added=own)


def unigrams():
    one = unigram(
        ["<unk>", "▁a", "b", "c"], special=["<s>"], bos_token="<s>", unk_token="<unk>"
    )
    two = unigram(["<unk>", "c", "b", "▁d"], special=["</s>"], eos_token="</s>")
    return [one, two]


def pieces():
    one = wordpiece(["[UNK]", "a", "##b", "c"], special=["[CLS]"], cls_token="[CLS]")
    two = wordpiece(["[UNK]", "c", "d", "##b", "##z"], special=["[SEP]"])
    return [one, two]


def write_llama(folder, tokenizer, seed=0, rows=None, tied=False, **more):
    """A random llama in the Hugging Face layout; its path as text."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    rows = rows or len(tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for letter in "qkvo":
            shapes[f"{layer}self_attn.{letter}_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}mlp.gate_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[f"{layer}input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (WIDTH,)
    draw = np.random.default_rng(seed)
    tensors = {
        name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return str(folder)
