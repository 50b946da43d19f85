"""Texts to tokens and back, chat templates, and the bytes that each token stands for.

Tokenizers are the fast ones of transformers; nothing here needs torch.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from collab_jax.io.gguf import Gguf

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's spelling of a space


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a Hugging Face folder, with its chat template.

    Args:
      folder: holds tokenizer.json, or what transformers can make one of.

    Raises:
      FileNotFoundError: where the folder holds no tokenizer.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> folder = tempfile.mkdtemp()
    >>> files = tokenizer.save_pretrained(folder)
    >>> load_tokenizer(folder)("b").input_ids
    [1]
    """
    folder = Path(folder)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).exists() for name in files):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: expected was one of {', '.join(files)}"
        )
    from transformers import AutoTokenizer  # it takes seconds to import

    return AutoTokenizer.from_pretrained(folder)


def from_gguf(file: Gguf) -> Any:
    """The tokenizer that the metadata of a GGUF file describes.

    Args:
      file: opened.

    Raises:
      ValueError: where it states no vocabulary, or one of an unknown kind.

    >>> metadata = {"general.architecture": "qwen2", "tokenizer.ggml.model": "gpt2",
    ...     "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    >>> from_gguf(Gguf(Path("a.gguf"), metadata, {}))("aab").input_ids
    [0, 2]
    """
    stated = {
        key.removeprefix("tokenizer."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    if "ggml.tokens" not in stated:
        raise ValueError(f"{file.path} states no vocabulary (tokenizer.ggml.tokens)")
    if not {"ggml.merges", "ggml.scores"} & stated.keys():
        raise ValueError(f"{file.path} states neither merges nor scores of its tokens")
    from transformers import PreTrainedTokenizerFast  # it takes seconds to import
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    fields = {ours: stated[key] for key, ours in names.items() if key in stated}
    family = file.metadata["general.architecture"]
    backend, _ = mapping.convert_gguf_tokenizer(family, fields)
    if stated.get("ggml.pre") == "smollm":
        # Every digit stands alone. transformers' reading of GGUF leaves this out, and
        # gives other tokens for spaces before digits ("  12"). This one is right:
        # llama.cpp cuts at \p{N} for "smollm", and no merge of the file has a digit,
        # so that the model was trained on digits cut off.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    special = {}
    for ours, theirs in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
    ):
        token = stated.get(f"ggml.{theirs}_token_id")
        if token is not None:
            special[f"{ours}_token"] = stated["ggml.tokens"][token]
    spelled = stated.get("ggml.model") == "llama"  # older files leave the default out
    begins = bool(stated.get("ggml.add_bos_token", spelled))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=begins and "bos_token" in special,
        add_eos_token=bool(stated.get("ggml.add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = stated.get("chat_template")
    return tokenizer


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    chat: bool = False,
    system: str | None = None,
) -> list[list[int]]:
    """Token ids of texts, as a prompt for the model.

    Args:
      tokenizer: of `load_tokenizer`.
      texts: prompts; in a chat, what the user says.
      chat: put each text into the tokenizer's chat template, up to where the model
        answers.
      system: first message of the chat.

    Raises:
      ValueError: for a chat with a tokenizer that has no template.

    >>> from tokenizers import Tokenizer, models
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> encode(tokenizer, ["a", "b"])
    [[0], [1]]
    >>> encode(tokenizer, ["a"], chat=True)
    Traceback (most recent call last):
    ValueError: this tokenizer has no chat template: the model is a base model, give...
    """
    if not chat:
        return [tokenizer(text).input_ids for text in texts]
    if not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template: the model is a base model, give it "
            "plain text"
        )
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        tokenizer.apply_chat_template(
            [*first, {"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for text in texts
    ]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens; special tokens are left out.

    Args:
      tokenizer: of `load_tokenizer`.
      ids: tokens; those beyond the vocabulary are left out too.

    >>> from tokenizers import Tokenizer, models
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> decode(tokenizer, [1, 0, 99])
    'b a'
    """
    known = [int(i) for i in ids if int(i) < len(tokenizer)]
    return tokenizer.decode(
        known, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token adds to a text, in bytes; b"" for special tokens.

    Concatenating the bytes of a text's tokens gives the text in UTF-8, which is how
    stop strings and grammars see tokens. SentencePiece tokenizers that put a space
    before a text decode the first token without it; here it stays.

    Args:
      tokenizer: byte-level BPE, or SentencePiece with byte tokens.

    Returns:
      V entries, by token id.

    Raises:
      ValueError: for a tokenizer of another kind.

    >>> from tokenizers import Tokenizer, models, decoders
    >>> backend = Tokenizer(models.BPE({"\u0120": 0, "a": 1, "\u0120a": 2}, []))
    >>> backend.decoder = decoders.ByteLevel()
    >>> from transformers import PreTrainedTokenizerFast
    >>> token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    [b' ', b'a', b' a']
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = set(_kinds(backend.get("decoder") or {}))
    if "ByteLevel" in kinds:
        alphabet = {char: byte for byte, char in _byte_alphabet().items()}
    elif "ByteFallback" in kinds:
        alphabet = None
    else:
        raise ValueError(
            f"the bytes of the tokens are not known for a decoder of {sorted(kinds)}; "
            "expected was ByteLevel or ByteFallback"
        )
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    vocab = tokenizer.get_vocab()
    found = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:
            if not added[i]["special"]:
                found[i] = _spaces(token, alphabet).encode()
        elif alphabet is not None:
            found[i] = bytes(alphabet[char] for char in token)
        elif match := _BYTE.fullmatch(token):
            found[i] = bytes([int(match[1], 16)])
        else:
            found[i] = token.replace(_SPACE, " ").encode()
    return found


def _spaces(token: str, alphabet: dict[str, int] | None) -> str:
    return token.replace(_SPACE, " ") if alphabet is None else token


def _kinds(decoder: dict) -> list[str]:
    inner = [kind for part in decoder.get("decoders", ()) for kind in _kinds(part)]
    return [decoder.get("type", "none"), *inner]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(rest)
    }
