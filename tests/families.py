"""Small models of every decoder family, with weights drawn from the tensors' names.

Sizes are odd, windows shorter than the text, norms and biases random, so that a wrong
detail shows in the logits. Nothing has to be stored: the weights follow from the names.
"""

import zlib

import numpy as np

from collab_jax.io import names

LENGTHS = (23, 17, 9)  # rows of unequal length, right-padded

_SIZES = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 5.0],
}
_GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5}
_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 11}


def _case(family, **changes):
    return {"model_type": family, **_SIZES, **changes}


# name -> config.json
CASES = {
    "llama": _case("llama", num_key_value_heads=6, rope_theta=100.0),
    "llama3_tied_biased": _case(
        "llama",
        rope_parameters=_LLAMA3,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_linear": _case(
        "llama", rope_theta=100.0, rope_scaling={"type": "linear", "factor": 3.0}
    ),
    "llama_yarn": _case("llama", rope_parameters={"rope_theta": 100.0, **_YARN}),
    "mistral": _case("mistral", head_dim=10, sliding_window=5),
    "mistral_unwindowed": _case("mistral", sliding_window=None, rope_theta=100.0),
    "qwen2": _case("qwen2", tie_word_embeddings=True),
    "qwen2_window": _case(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2_yarn": _case(
        "qwen2", rope_theta=100.0, rope_scaling={**_YARN, "truncate": False}
    ),
    "qwen3": _case("qwen3", head_dim=10, num_key_value_heads=3),
    "qwen3_window_biased": _case(
        "qwen3",
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma2": _case(
        "gemma2",
        **_GEMMA,
        rope_theta=100.0,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": _case(
        "gemma3_text",
        **_GEMMA,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
    "gemma3_older_keys": _case(
        "gemma3_text",
        **_GEMMA,
        sliding_window_pattern=2,
        rope_theta=1e3,
        rope_local_base_freq=20.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        final_logit_softcapping=2.0,
    ),
    "phi3": _case("phi3", sliding_window=6),
    "phi3_short": _case(
        "phi3", rope_scaling=_LONG, original_max_position_embeddings=32
    ),
    "phi3_long_partial": _case(
        "phi3",
        hidden_size=48,
        partial_rotary_factor=0.75,
        rope_scaling=_LONG,
        original_max_position_embeddings=8,
    ),
    "olmo2": _case("olmo2", rope_theta=100.0),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_positions": 64,
        "n_embd": 36,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _case("gpt_neox", rotary_pct=0.25, hidden_size=72),
    "gpt_neox_sequential": _case(
        "gpt_neox",
        use_parallel_residual=False,
        hidden_act="gelu_new",
        rotary_emb_base=100.0,
        rotary_pct=1.0,
    ),
    "mixtral": _case("mixtral", num_local_experts=5, rope_theta=100.0),
    "mixtral_window": _case("mixtral", num_local_experts=4, sliding_window=5),
    "qwen3_moe": _case(
        "qwen3_moe", **_EXPERTS, head_dim=10, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "qwen3_moe_alternating": _case(
        "qwen3_moe",
        **_EXPERTS,
        head_dim=6,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=5,
    ),
}


def tensors(config):
    """The checkpoint of a model: name -> float32 array, drawn from its name."""
    drawn = {}
    for rule in names.rules(config):
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = rng.standard_normal(shape)
            if len(shape) == 1:
                norm = "norm" in name or ".ln_" in name
                one = 1 - config.norm_offset if norm and name.endswith("weight") else 0
                values = one + 0.3 * values
            elif "embed" in name or "wte" in name or "wpe" in name:
                values = values / config.embed_scale
            else:
                kernel = rule.load([np.zeros(s, bool) for s in rule.shapes])[0]
                values = 1.3 * values * kernel.shape[-2] ** -0.5
            drawn[name] = values.astype(np.float32)
    return drawn


def batch(config):
    """Tokens `[3, 23]` and lengths `[3]`; what lies behind a length is padding."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(3, config.vocab, (len(LENGTHS), max(LENGTHS))).astype(np.int32),
        np.array(LENGTHS, np.int32),
    )
