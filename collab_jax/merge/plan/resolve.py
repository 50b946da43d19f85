"""From documents to stages: which tensors are merged into what, before any is read.

No tensor is read for it: names, types, shapes and config.json are enough. Tensors are
those of the checkpoints, under their names there. mergekit 0.1.5 joins the experts of a
layer into one tensor first, for the families it knows; here every expert is a tensor,
which gives other thresholds and norms, and the plan says so.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from collab_jax.merge.plan import layout, modules, tokens
from collab_jax.merge.plan.config import Document, place_of, references
from collab_jax.merge.plan.edits import edited, edits
from collab_jax.merge.plan.group import Module
from collab_jax.merge.plan.reference import Reference, show
from collab_jax.merge.plan.sections import Section, sliced, whole
from collab_jax.merge.plan.stage import Stage
from collab_jax.merge.plan.targets import Group, Model, ModelFacts, Target, group

_EXPERT = re.compile(r"\.experts\.\d+\.")
# methods for which it is the same whether tensors are joined or apart
_BY_ELEMENT = ("linear", "task_arithmetic", "passthrough", "nearswap", "ram")


def plan(
    documents: Sequence[Document], layouts: Callable[[Reference], ModelFacts]
) -> tuple[Stage, ...]:
    """Resolves every tensor of every document.

    Args:
      documents: of `config.read`.
      layouts: from a model to what is known of it; with an adapter, of the model into
        which the adapter is merged. It is asked once for each model, and not for
        results of earlier documents.

    Returns:
      A stage for each document.

    Raises:
      ValueError: where models do not fit each other or the document; it names the place
        in the document, the tensor and the model.

    >>> import numpy as np
    >>> from collab_jax.io.safetensors import Layout
    >>> from collab_jax.merge.plan.config import read
    >>> merge = read('''
    ... merge_method: slerp
    ... base_model: a
    ... models: [{model: a}, {model: b}]
    ... parameters: {t: [0, 1]}
    ... ''')
    >>> names = ["model.norm.weight", "model.layers.0.up", "model.layers.1.up"]
    >>> facts = ModelFacts({n: Layout(np.dtype("float32"), (4,)) for n in names}, {})
    >>> [stage] = plan(merge, lambda model: facts)
    >>> for target in stage.targets:
    ...     print(target.name, target.base.model, target.sources[0].model, target.knobs)
    model.layers.0.up a b {'t': 0.0}
    model.layers.1.up a b {'t': 1.0}
    model.norm.weight a b {'t': 0.0}
    """
    stages: list[Stage] = []
    known: dict[str, ModelFacts] = {}
    results: dict[str, ModelFacts] = {}
    for merge in documents:
        place = f"document {merge.name or len(stages) + 1}: "
        facts = {}
        for model in references(merge):
            key, path = show(model), model.model.path
            if path not in results and key not in known:
                try:
                    known[key] = layouts(model)
                except (OSError, ValueError) as error:
                    raise type(error)(f"{place_of(merge, model)}: {error}") from None
            facts[key] = results[path] if path in results else known[key]
        try:
            stage = _stage(merge, facts, set(results))
        except ValueError as error:
            raise ValueError(f"{place * (len(documents) > 1)}{error}") from None
        stages.append(stage)
        if merge.name is not None:
            results[merge.name] = _result(stage, facts)
    return tuple(stages)


def _stage(merge: Document, facts: dict[str, ModelFacts], earlier: set[str]) -> Stage:
    models = {show(model): model for model in references(merge)}
    if len(models) < len(references(merge)):
        raise ValueError("override_architecture: a model stands with and without it")
    named = [*models.values(), *tokens.references(merge.tokenizer)]
    donor = next(iter(models))
    for key, fact in facts.items():
        if not fact.layouts:
            raise ValueError(f"{key}: the checkpoint holds no tensors")
    sections = _sections(merge, models, facts, donor)
    targets = tuple(target for s in sections.values() for target in s.targets)
    _check_names(targets)
    if merge.tokenizer is None and all(fact.settled for fact in facts.values()):
        _check_rows(targets)
    changes, notes = edits(
        {name: s.layers for name, s in sections.items()},
        {key: fact.config for key, fact in facts.items()},
        donor,
        _untied(targets, facts, donor),
        merge.out_dtype or merge.dtype,
    )
    notes = [*merge.notes, *(n for s in sections.values() for n in s.notes), *notes]
    notes += _differences(facts, donor)
    if merge.method not in _BY_ELEMENT and any(_EXPERT.search(t.name) for t in targets):
        notes.append(
            "each expert of a layer is merged on its own; mergekit 0.1.5 merges those "
            f"of some families as one tensor, which is another merge by {merge.method}"
        )
    return Stage(
        merge.name,
        merge.method,
        targets,
        models,
        {show(m): m.model.path for m in named if m.model.path in earlier},
        show(merge.base) if merge.base else None,
        donor,
        merge.dtype,
        merge.out_dtype,
        merge.tokenizer,
        merge.chat_template,
        {name: len(s.layers) for name, s in sections.items() if s.layers is not None},
        changes,
        tuple(dict.fromkeys(notes)),
    )


def _sections(
    merge: Document,
    models: dict[str, Reference],
    facts: dict[str, ModelFacts],
    donor: str,
) -> dict[str, Section]:
    """The modules of a document, each with its own part of every model."""
    like = facts[donor].layouts
    views = {key: layout.view(facts[key].layouts, like) for key in models}
    parts: dict[str, dict[str, list[str]]] = {}
    for key, view in views.items():
        wanted = list(merge.modules)
        parts[key] = {"": list(view)} if wanted == [""] else modules.split(view, wanted)
    sections = {}
    for name, module in merge.modules.items():
        found = {}
        for key, reference in models.items():
            own = {n: views[key][n] for n in parts[key][name]}
            try:
                structure = layout.structure(own)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            found[reference] = Model(key, facts[key], own, structure)
        sections[name] = _section(merge, module, found, part=name != "")
    return sections


def _section(
    merge: Document, module: Module, models: dict[Reference, Model], part: bool
) -> Section:
    levels = [module.parameters, merge.parameters]
    types = (merge.dtype, merge.out_dtype, merge.tokenizer is not None)
    if module.models is not None:
        return whole(
            group(merge.method, module.models, merge.base, models, levels, *types)
        )
    groups: list[Group] = []
    ranges = []
    for piece in module.slices or ():
        own = [piece.parameters, *levels]
        groups.append(
            group(merge.method, piece.sources, piece.base, models, own, *types)
        )
        ranges.append([source.layers for source in piece.sources if source.layers])
    return sliced(groups, ranges, module.where, part)


def _check_names(targets: Sequence[Target]) -> None:
    counts = Counter(target.name for target in targets)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"tensor {name} would be written {count} times")


def _check_rows(targets: Sequence[Target]) -> None:
    """Embedding and head of the result have as many rows."""
    rows = {
        target.name: target.layout.shape[0]
        for target in targets
        if target.vocabulary_axis == 0
    }
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(
            f"the result's tensors have rows for unequal numbers of tokens: {listed}; "
            "set tokenizer: {source: base} or {source: union} to align them"
        )


def _untied(
    targets: Sequence[Target], facts: dict[str, ModelFacts], donor: str
) -> bool:
    """Whether the result has a head of its own and the donor's config.json says not.

    A head is its own where it is made from at least one tensor that is no embedding, of
    a model that does not say it is tied.
    """
    if layout.value(facts[donor].config, "tie_word_embeddings") is False:
        return False
    for target in targets:
        if target.vocabulary_axis != 0 or not layout.is_head(target.name):
            continue
        for tensor in (*target.sources, *filter(None, [target.base])):
            says = layout.value(facts[tensor.model].config, "tie_word_embeddings")
            if layout.is_head(tensor.name) and not says:
                donor_says = layout.value(facts[donor].config, "tie_word_embeddings")
                return bool(donor_says) or not any(
                    layout.is_head(name) for name in facts[donor].layouts
                )
    return False


def _differences(facts: dict[str, ModelFacts], donor: str) -> list[str]:
    """Where a config.json says otherwise than the donor's what the weights mean."""
    first, notes = facts[donor].config, []
    for key, fact in facts.items():
        for entry in ("model_type", "rope_theta", "rope_scaling", "rope_parameters"):
            ours, theirs = (layout.value(c, entry) for c in (first, fact.config))
            if ours != theirs and ours is not None and theirs is not None:
                notes.append(
                    f"{entry} is {theirs} in {key} and {ours} in {donor}, whose "
                    "config.json the result takes"
                )
    return notes


def _result(stage: Stage, facts: dict[str, ModelFacts]) -> ModelFacts:
    """What is known of a stage's result, for the stages after it."""
    settled = stage.tokenizer is None and all(f.settled for f in facts.values())
    return ModelFacts(
        {target.name: target.layout for target in stage.targets},
        edited(facts[stage.donor].config, stage.config),
        settled,
    )
