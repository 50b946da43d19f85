"""Collaboration of large language models in JAX: merge, ensemble, cooperate.

Names are imported when they are first used, so that `import collab_jax` is quick.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collab_jax.io.load import Model, load, save

__version__ = "0.1.0"
__all__ = ["Model", "load", "save"]


def __getattr__(name: str) -> Any:
    """Imports `load`, `save` and `Model`, or a module of the package."""
    if name in __all__:
        return getattr(import_module("collab_jax.io.load"), name)
    if not name.startswith("_") and find_spec(f"collab_jax.{name}"):
        return import_module(f"collab_jax.{name}")
    raise AttributeError(f"module 'collab_jax' has no attribute {name!r}")
