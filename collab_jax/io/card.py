"""The model card of a merge: what was merged, how, and how to do it again."""

import re
from collections.abc import Sequence

# How each of mergekit's methods is called, and where it is described.
METHODS = {
    "linear": ("Linear (model soups)", "https://arxiv.org/abs/2203.05482"),
    "slerp": ("SLERP", "https://doi.org/10.1145/325165.325242"),
    "nuslerp": ("NuSLERP", "https://doi.org/10.1145/325165.325242"),
    "multislerp": ("Multi-SLERP", None),
    "karcher": ("Karcher mean", "https://arxiv.org/abs/2603.04972"),
    "task_arithmetic": ("Task arithmetic", "https://arxiv.org/abs/2212.04089"),
    "ties": ("TIES", "https://arxiv.org/abs/2306.01708"),
    "dare_ties": ("DARE TIES", "https://arxiv.org/abs/2311.03099"),
    "dare_linear": ("DARE", "https://arxiv.org/abs/2311.03099"),
    "breadcrumbs": ("Model Breadcrumbs", "https://arxiv.org/abs/2312.06795"),
    "breadcrumbs_ties": (
        "Model Breadcrumbs with TIES",
        "https://arxiv.org/abs/2312.06795",
    ),
    "della": ("DELLA", "https://arxiv.org/abs/2406.11617"),
    "della_linear": ("DELLA, linear", "https://arxiv.org/abs/2406.11617"),
    "sce": ("SCE (FuseChat)", "https://arxiv.org/abs/2408.07990"),
    "ram": ("Reinforced Agent Merging", "https://arxiv.org/abs/2601.13572"),
    "ramplus_tl": (
        "Reinforced Agent Merging Plus, by tensor",
        "https://arxiv.org/abs/2601.13572",
    ),
    "model_stock": ("Model Stock", "https://arxiv.org/abs/2403.19522"),
    "nearswap": ("NearSwap", None),
    "arcee_fusion": ("Arcee Fusion", None),
    "passthrough": ("Passthrough", None),
}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def card(
    name: str,
    methods: Sequence[str],
    models: Sequence[str],
    base: str | None,
    recipe: str,
    command: str,
    version: str,
    seed: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text of README.md.

    Args:
      name: of the result.
      methods: names that a merge configuration uses, in the order of its documents.
      models: as the configuration writes them, in its order.
      base: one of them, or None.
      recipe: the configuration, letter by letter.
      command: the line that was run.
      version: of this library.
      seed: of random methods, None where none was used.
      notes: one line each, for what a user of the result should know.

    >>> text = card("mix", ["ties"], ["org/base", "./mine"], "org/base", "a: 1",
    ...     "collab-jax merge a.yml mix", "0.1", 7)
    >>> print(text[:80])
    ---
    base_model:
    - org/base
    library_name: transformers
    tags:
    - merge
    - collab_jax
    """
    hub = [model for model in dict.fromkeys(models) if _repository(model)]
    lines = ["---"]
    if hub:
        lines += ["base_model:", *(f"- {_repository(m)}" for m in hub)]
    else:
        lines += ["base_model: []"]
    lines += ["library_name: transformers", "tags:"]
    lines += ["- merge", "- collab_jax", "- mergekit", "---", "", f"# {name}", ""]
    lines += ["A merge of language models, made with collab_jax.", "", "## Method", ""]
    lines += [f"- {_method(method)}" for method in dict.fromkeys(methods)]
    if base is not None:
        lines += ["", f"The base model is {_model(base)}."]
    lines += ["", "## Models", ""]
    lines += [f"- {_model(model)}" for model in dict.fromkeys(models) if model != base]
    lines += ["", "## Recipe", "", *_fenced(recipe, "yaml"), ""]
    lines += [*_fenced(command, "bash"), "", f"collab_jax {version}"]
    lines[-1] += "." if seed is None else f", seed {seed}."
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _repository(model: str) -> str | None:
    """The repository of the Hub in a reference, None for a folder."""
    plain = re.split(r"[@+]", model)[0]
    return plain if _HUB.fullmatch(plain) else None


def _model(model: str) -> str:
    plain = _repository(model)
    return f"[{model}](https://huggingface.co/{plain})" if plain else f"`{model}`"


def _method(method: str) -> str:
    title, source = METHODS.get(method, (method, None))
    named = f"[{title}]({source})" if source else title
    return f"{named} (`{method}`)"


def _fenced(text: str, language: str) -> list[str]:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *text.rstrip("\n").split("\n"), fence]
