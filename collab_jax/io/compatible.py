"""What in the configs and tokenizers of models speaks against merging them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collab_jax.io.templates import read_template
from collab_jax.io.tokenizer import load_tokenizer
from collab_jax.models.defaults import DEFAULTS


class Facts(NamedTuple):
    """What is known of a model without its weights."""

    name: str
    config: dict[str, Any]  # config.json
    tokens: dict[str, int] | None = None  # None: no tokenizer
    template: str | None = None  # for chats


# key, and why another value matters; the first found of several counts as the key
_WRONG = {
    "model_type": "their tensors mean different things",
    "hidden_size": "their tensors have different shapes",
    "intermediate_size": "their tensors have different shapes",
    "num_hidden_layers": "only slices can merge them",
    "num_attention_heads": "the same rows belong to different heads",
    "num_key_value_heads": "the same rows belong to different heads",
    "head_dim": "the same rows belong to different heads",
    "experts": "experts have no counterparts",
    "activation": "the same weights compute different functions",
    "rope_theta": "their positions turn by different angles",
    "rope_scaling": "their positions turn by different angles",
    "partial_rotary_factor": "their positions turn different dimensions",
    "query_pre_attn_scalar": "their scores have different scales",
    "attn_logit_softcapping": "their scores have different scales",
    "final_logit_softcapping": "their logits have different scales",
    "layer_types": "the same layer sees different spans",
    "quantization_config": "quantised weights cannot be averaged",
}
_ODD = {
    "norm_eps": "the result has one of them",
    "sliding_window": "the result has one of them",
    "tie_word_embeddings": "where some have a head, the result has one",
    "experts_per_token": "the result has one of them",
    "norm_topk_prob": "the result has one of them",
    "attention_bias": "biases of one have no counterpart",
    "mlp_bias": "biases of one have no counterpart",
    "max_position_embeddings": "one has seen longer texts",
    "dtype": "name a dtype, so that no precision is lost",
}
_NAMES = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "experts_per_token": ("num_experts_per_tok",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "dtype": ("dtype", "torch_dtype"),
}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_facts(name: str, folder: str | Path) -> Facts:
    """Reads the config, the tokenizer and the chat template of a model's folder.

    Args:
      name: how messages call it.
      folder: in the Hugging Face layout.

    Raises:
      FileNotFoundError: for a folder without config.json.
      ValueError: for one that is damaged.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> size = (folder / "config.json").write_text('{"vocab_size": 3}')
    >>> read_facts("m", folder)
    Facts(name='m', config={'vocab_size': 3}, tokens=None, template=None)
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {folder} holds no config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
        template = read_template(folder)
    except ValueError as error:
        raise ValueError(f"{name}: a file of {folder} is damaged ({error})") from None
    try:
        tokens = load_tokenizer(folder).get_vocab()
    except Exception:  # none, or whatever transformers makes of a damaged one
        tokens = None
    return Facts(name, config, tokens, template)


def check_models(facts: Sequence[Facts]) -> list[str]:
    """Tells where models differ, each from the first: the base, if there is one.

    Args:
      facts: of the models in the order of the config.

    Returns:
      A line for each difference, with both values. It begins with "wrong:" where a
      merge would be wrong unless the config does something about it, with "suspicious:"
      where it may be meant.

    >>> one = Facts("a", {"model_type": "llama", "vocab_size": 5, "rope_theta": 1e4})
    >>> two = Facts("b", {"model_type": "llama", "vocab_size": 5, "rope_theta": 1e6})
    >>> check_models([one, two])
    ['wrong: rope_theta: a 10000.0, b 1000000.0; their positions turn by different
    angles']
    """
    if not facts:
        return []
    first, lines = facts[0], list[str]()
    for other in facts[1:]:
        found = [*_configs(first, other), *_vocabularies(first, other)]
        lines += sorted(found, key=lambda line: not line.startswith("wrong"))
    return lines


def _line(
    wrong: bool, key: str, one: tuple[Facts, Any], two: tuple[Facts, Any], why: str
) -> str:
    values = ", ".join(f"{facts.name} {_short(x)}" for facts, x in (one, two))
    return f"{'wrong' if wrong else 'suspicious'}: {key}: {values}; {why}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _configs(one: Facts, two: Facts) -> Iterator[str]:
    mine, yours = _plain(one.config), _plain(two.config)
    for wrong, table in ((True, _WRONG), (False, _ODD)):
        for key, why in table.items():
            a, b = mine.get(key), yours.get(key)
            if a != b:
                yield _line(wrong, key, (one, a), (two, b), why)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a config under one name each, with the defaults of its family."""
    inner = config.get("text_config")
    flat = {**config, **inner} if isinstance(inner, dict) else dict(config)
    full = {**DEFAULTS.get(str(flat.get("model_type")), {}), **flat}
    out = {key: full.get(key) for key in (*_WRONG, *_ODD)}
    for key, names in _NAMES.items():
        # what the file says comes before what the family has by default
        values = [part[n] for part in (flat, full) for n in names if n in part]
        out[key] = next((x for x in values if x is not None), None)
    heads, width = out["num_attention_heads"], out["hidden_size"]
    out["num_key_value_heads"] = out["num_key_value_heads"] or heads
    if out["head_dim"] is None and heads and width:
        out["head_dim"] = width // heads
    out["tie_word_embeddings"] = bool(full.get("tie_word_embeddings"))
    out["rope_theta"], out["rope_scaling"] = _rope(full)
    return out


def _rope(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Base and scaling of rotary positions, as transformers 4 or 5 write them."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in stated.values()):  # by kind of layer
        return config.get("rope_theta"), dict(stated)
    family = {"mixtral": 1e6, "gemma3_text": 1e6}  # others leave out 10000
    theta = stated.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = family.get(str(config.get("model_type")), 1e4)
    scaling = {k: v for k, v in stated.items() if k not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", stated.get("type", "default"))
    return float(theta), None if scaling == {"rope_type": "default"} else scaling


def _vocabularies(one: Facts, two: Facts) -> Iterator[str]:
    align = "set tokenizer: {source: union} or {source: base}"
    rows = [_rows(facts.config) for facts in (one, two)]
    if rows[0] != rows[1]:
        yield _line(True, "vocab_size", (one, rows[0]), (two, rows[1]), align)
    if one.tokens is None or two.tokens is None:
        if one.tokens != two.tokens:
            said = [None if f.tokens is None else len(f.tokens) for f in (one, two)]
            why = "whether ids mean the same cannot be told"
            yield _line(False, "tokens", (one, said[0]), (two, said[1]), why)
    else:
        yield from _tokens(one, two, one.tokens, two.tokens, align)
    if one.template != two.template:
        why = "the result has one; chat_template chooses"
        said = [None if f.template is None else repr(f.template) for f in (one, two)]
        if None not in said and _short(said[0]) == _short(said[1]):
            said = [f"{len(str(text))} characters" for text in said]
        yield _line(False, "chat_template", (one, said[0]), (two, said[1]), why)
    for key in _SPECIAL:
        a, b = one.config.get(key), two.config.get(key)
        names = [_spelled(a, one.tokens), _spelled(b, two.tokens)]
        if names[0] != names[1]:
            why = "the result has that of the donor"
            yield _line(False, key, (one, names[0]), (two, names[1]), why)


def _rows(config: Mapping[str, Any]) -> Any:
    inner = config.get("text_config")
    return (inner if isinstance(inner, dict) else config).get("vocab_size")


def _tokens(
    one: Facts,
    two: Facts,
    mine: Mapping[str, int],
    yours: Mapping[str, int],
    align: str,
) -> Iterator[str]:
    moved = [
        token for token in mine.keys() & yours.keys() if mine[token] != yours[token]
    ]
    if moved:
        token = min(moved, key=lambda token: mine[token])
        a, b = f"{token!r} is {mine[token]}", f"{token!r} is {yours[token]}"
        why = f"{len(moved)} tokens have other ids; {align}"
        yield _line(True, "token ids", (one, a), (two, b), why)
    ids = {id: token for token, id in mine.items()}
    clash = [
        token
        for token, id in yours.items()
        if token not in mine and id in ids and ids[id] not in yours
    ]
    if clash:
        token = min(clash, key=lambda token: yours[token])
        id = yours[token]
        why = f"{len(clash)} ids stand for other tokens; {align}"
        a, b = f"{id} is {ids[id]!r}", f"{id} is {token!r}"
        yield _line(True, "token ids", (one, a), (two, b), why)
    lacking = len(mine.keys() - yours.keys()), len(yours.keys() - mine.keys())
    if any(lacking) and not clash:
        a, b = f"{lacking[0]} of its own", f"{lacking[1]} of its own"
        yield _line(False, "tokens", (one, a), (two, b), "the others lack them")


def _spelled(value: Any, tokens: Mapping[str, int] | None) -> Any:
    """Ids as the tokens that they stand for, where these are known."""
    if tokens is None or value is None:
        return value
    wanted = set(value if isinstance(value, list) else [value])
    names = {id: token for token, id in tokens.items() if id in wanted}
    return " ".join(sorted(names.get(id, str(id)) for id in wanted))
