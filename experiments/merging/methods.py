"""Every method of the table, with the few settings that it may choose from.

Names are those of the papers. A setting is chosen on validation rows, with the first
seed of experts; the defaults of the papers are among them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from collab_jax.merge import averages, compete, localized, recipes, spectral
from collab_jax.merge.greedy import greedy_soup
from collab_jax.merge.memory import merge
from collab_jax.merge.schedule import count_layers
from collab_jax.merge.stack import Transform, chain, where
from collab_jax.merge.weigh import mean

Tensors = dict[str, Any]  # name in a checkpoint -> tensor
# (base, experts, key) -> one model, or N functions that make the model of an expert
Make = Callable[[Tensors, list[Tensors], jax.Array], Any]


class Method(NamedTuple):
    """A way to merge."""

    name: str
    settings: tuple[tuple[str, Make], ...]  # what is said of each, and how it is done
    random: bool = False


def methods(names: Sequence[str], score: Callable[[Tensors], float]) -> list[Method]:
    """All methods, those of one kind together.

    Args:
      names: of the model's tensors.
      score: of a model on validation rows, higher is better; for the greedy soup.
    """
    layers = count_layers(names)
    sums, ones = (0.3, 0.5, 0.7, 1.0, 1.3), (1.0, 1.5, 2.0)

    def by(make, values, random=False, name="lambda"):
        """One setting for each value of a scale."""
        return tuple(
            (f"{name} {value:g}", _merged(make(value))) for value in values
        ), random

    def greedy(base, experts, key):
        return greedy_soup(experts, score)[0]

    def beyond(alpha):
        return chain(mean, recipes.expo(alpha))

    lines = tuple(
        (f"alpha {a:.2g}, beta {b:.2g}", _merged(recipes.lines(a, b, layers)))
        for a, b in ((0.33, 0.33), (0.33, 0.67), (0.2, 0.8))
    )
    tall = tuple(
        (
            f"threshold {t:g}",
            _apart(lambda b, e, t=t: localized.tall_masks(b, e, None, t)),
        )
        for t in (0.2, 0.4)
    )
    karcher = (("", _merged(averages.karcher_mean(), with_base=False)),)
    found = {
        "uniform soup": ((("", _merged(averages.soup(), with_base=False)),), False),
        "greedy soup": ((("", greedy),), False),
        "task arithmetic": by(recipes.task_arithmetic, sums),
        "ExPO on the soup": by(beyond, (0.3, 0.5), name="alpha"),
        "MetaGPT": ((("", _merged(recipes.metagpt())),), False),
        "VaRM": ((("", _merged(averages.varm())),), False),
        "Model Stock": ((("", _merged(averages.model_stock())),), False),
        "Karcher mean": (karcher, False),
        "LiNeS": (lines, False),
        "TIES": by(lambda lam: recipes.ties(0.2, lam), ones),
        "DARE": by(lambda lam: recipes.dare(0.9, lam), sums[:2], True),
        "DARE-TIES": by(lambda lam: recipes.dare_ties(0.9, 0.2, lam), (0.5, 1.0), True),
        "DELLA": by(lambda lam: recipes.della(0.5, 0.1, lam), ones[:2], True),
        "Breadcrumbs": by(lambda a: recipes.breadcrumbs(0.85, 0.01, a), (*sums, 1.6)),
        "MagMax": by(recipes.magmax, (0.5, 1.0)),
        "PCB": by(lambda lam: compete.pcb(0.1, lam), ones),
        "SCE": by(averages.sce, (0.1, 0.5), name="share"),
        "Consensus TA": by(lambda lam: localized.consensus(2, 0.4, lam), sums),
        "TSV-M": by(lambda lam: _spectral(spectral.tsv_m(lam)), (0.5, 1.0, 1.5)),
        "Iso-C": by(lambda lam: _spectral(spectral.iso_c(lam)), (0.5, 1.0, 1.5, 2.0)),
        "Iso-CTS": by(
            lambda lam: _spectral(spectral.iso_cts(0.8, lam)), (0.5, 1.0, 1.5, 2.0)
        ),
        "WUDI": by(lambda lam: _spectral(spectral.wudi(0.0, lam)), (0.5, 1.0, 1.5)),
        "TALL masks (a model per task)": (tall, False),
        "EMR (a model per task)": ((("", _apart(localized.emr)),), False),
    }  # fmt: skip
    return [Method(name, *each) for name, each in found.items()]


def _spectral(part: Transform) -> Transform:
    """Projections by their singular vectors, embedding and norms by the mean."""
    return chain(where(".*proj.*", part), where("(?!.*proj).*", mean))


def _merged(part: Transform, with_base: bool = True) -> Make:
    def make(base, experts, key):
        return merge(part, base if with_base else None, experts, key=key)

    return make


def _apart(make: Callable[..., localized.Localized]) -> Make:
    def models(base, experts, key):
        found = make(base, experts)
        return [lambda n=n: found.materialise(n) for n in range(len(experts))]

    return models
