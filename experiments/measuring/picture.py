"""Pictures beside the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def picture(path: Path, draw: Callable[..., Any], *shown: Any) -> bool:
    """Saves what is drawn; False without matplotlib.

    Args:
      path: of the results; the picture has their name and ends with `.png`.
      draw: from pyplot, and what is shown, to a figure.
      shown: is given to `draw`.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot, *shown)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True
