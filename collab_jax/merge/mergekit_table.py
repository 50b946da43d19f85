"""What mergekit 0.1.5 lets a configuration say for each of its 20 methods, as data.

The planner checks a configuration against this table; `merge.mergekit` computes with
knobs of the same names. Sources are counted without the base, except where the base is
a source like any other ("source").
"""

from typing import Any, Literal, NamedTuple

REQUIRED: Any = object()  # the default of a parameter that has none


class Parameter(NamedTuple):
    """One parameter of a method."""

    kind: Literal["float", "int", "bool"]
    default: Any = REQUIRED


class Spec(NamedTuple):
    """What a method takes."""

    per_source: dict[str, Parameter]  # one value per source
    shared: dict[str, Parameter]  # one value per tensor
    # "source": base_model is no base to the method but one more source, with
    # parameters of its own; in `slices` it is not added
    base: Literal["required", "optional", "source"]
    least: int = 1  # sources
    most: int | None = None
    wide: bool = False  # half precision in, float32 out
    source: str = ""  # where the method is described


_WEIGHT = {"weight": Parameter("float")}
_DENSITY = {"density": Parameter("float", 1.0)}
_INT8 = {"int8_mask": Parameter("bool", False)}  # changes memory there, never numbers
_EPSILON = {"epsilon": Parameter("float", 1e-5)}


def _arithmetic(source: str, normalize: bool, rescale: bool, **more: float) -> Spec:
    """The family of task arithmetic: one set of parameters, other defaults."""
    shared = _INT8 | {
        "normalize": Parameter("bool", normalize),
        "rescale": Parameter("bool", rescale),
        "lambda": Parameter("float", 1.0),
    }
    own = {name: Parameter("float", default) for name, default in more.items()}
    return Spec(
        _WEIGHT | _DENSITY | own, shared, "required", least=0, source=_arxiv(source)
    )


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


TABLE: dict[str, Spec] = {
    "linear": Spec(
        _WEIGHT,
        {"normalize": Parameter("bool", True)},
        "source",
        source=_arxiv("2203.05482"),
    ),
    "slerp": Spec({}, {"t": Parameter("float")}, "required", 1, 1),
    "nuslerp": Spec(
        _WEIGHT,
        {
            "nuslerp_row_wise": Parameter("bool", False),
            "nuslerp_flatten": Parameter("bool", True),
        },
        "optional",
        2,
        2,
    ),
    "multislerp": Spec(
        _WEIGHT,
        {
            "normalize_weights": Parameter("bool", True),
            "eps": Parameter("float", 1e-8),
        },
        "optional",
    ),
    "karcher": Spec(
        {},
        {"max_iter": Parameter("int", 10), "tol": Parameter("float", 1e-5)},
        "source",
        source=_arxiv("2603.04972"),
    ),
    "task_arithmetic": _arithmetic("2212.04089", normalize=False, rescale=False),
    "ties": _arithmetic("2306.01708", normalize=True, rescale=False),
    "dare_ties": _arithmetic("2311.03099", normalize=False, rescale=True),
    "dare_linear": _arithmetic("2311.03099", normalize=False, rescale=True),
    "breadcrumbs": _arithmetic("2312.06795", False, False, gamma=0.01),
    "breadcrumbs_ties": _arithmetic("2312.06795", False, False, gamma=0.01),
    "della": _arithmetic("2406.11617", True, True, epsilon=0.15),
    "della_linear": _arithmetic("2406.11617", False, True, epsilon=0.15),
    "sce": Spec(
        {},
        _INT8 | {"select_topk": Parameter("float", 1.0)},
        "required",
        least=0,
        source=_arxiv("2408.07990"),
    ),
    "ram": Spec({}, _EPSILON, "required", least=0, source=_arxiv("2601.13572")),
    "ramplus_tl": Spec(
        {},
        {"r": Parameter("float", 0.1), "alpha": Parameter("float", 0.2)} | _EPSILON,
        "required",
        least=0,
        wide=True,
        source=_arxiv("2601.13572"),
    ),
    "model_stock": Spec(
        {},
        {"filter_wise": Parameter("bool", False)},
        "required",
        least=2,
        source=_arxiv("2403.19522"),
    ),
    "nearswap": Spec({}, {"t": Parameter("float")}, "required", 1, 1),
    "arcee_fusion": Spec({}, {}, "required", 1, 1, wide=True),
    "passthrough": Spec({"scale": Parameter("float", None)}, {}, "source", 1, 1),
}
