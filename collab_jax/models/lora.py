"""Low-rank adaptation (LoRA, arXiv:2106.09685) as a tree beside the model's.

An adapter is a plain nested dict with factors `a` and `b` in the place of the kernels
it changes, and nothing else. The model knows nothing of it: `apply` puts leaves that
multiply by `kernel + scale * a @ b` where the kernels were.

Shapes: I size in, O size out, R rank, `...` any leading axes.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import tree
from collab_jax.lm import LM, Backbone, Params
from collab_jax.models.linear import project

LINEAR = r".*/attention/[qkvo]/kernel|.*/mlp/(gate|up|down)/kernel"
ATTENTION = r".*/attention/[qkvo]/kernel"


class LowRank(NamedTuple):
    """A kernel with a low-rank correction, for `collab_jax.models.linear.project`."""

    kernel: Any  # [I, O], or again a leaf with project
    a: jax.Array  # [I, R]
    b: jax.Array  # [R, O]
    scale: Any  # scalar, alpha / R

    def project(self, x: jax.Array) -> jax.Array:
        """`x @ kernel + scale * (x @ a) @ b`, for x `[..., I]`."""
        low = project(project(x, self.a), self.b)
        return project(x, self.kernel) + jnp.asarray(self.scale, x.dtype) * low


def init(
    key: jax.Array, params: Params, rank: int, select: str = LINEAR, dtype: Any = None
) -> Params:
    """A new adapter: a is normal with variance 1 / I, b is zero, so it changes nothing.

    Args:
      key: consumed; each leaf's key is folded from its path, so that a wider selection
        leaves the others' factors as they are.
      params: the model's parameters (or their `jax.eval_shape`).
      rank: R, 1 to min(I, O).
      select: regular expression for the whole path of the kernels to adapt; `LINEAR`
        is all of attention and MLP, `ATTENTION` that of attention.
      dtype: type of the factors; None is the kernel's.

    Raises:
      ValueError: where nothing is selected, a selected leaf is no kernel `[I, O]`
        (experts `[E, I, O]` among them), or the rank does not fit; for packed
        parameters.

    >>> params = {"attention": {"q": {"kernel": jnp.ones((4, 6))}}}
    >>> adapter = init(jax.random.key(0), params, rank=2, select=".*/kernel")
    >>> tree.shapes(adapter)
    {'attention/q/kernel/a': (4, 2), 'attention/q/kernel/b': (2, 6)}
    """
    tree.refuse_packed(params, "measured for an adapter")
    chosen = tree.select(params, select)
    if not chosen:
        raise ValueError(
            f"no leaf matches {select!r}; the paths are like {tree.paths(params)[:4]}"
        )
    adapter: dict[str, Any] = {}
    for path, kernel in chosen.items():
        if "/experts/" in path:
            raise ValueError(
                f"{path} {kernel.shape} holds the kernels of experts, which LoRA does "
                "not adapt here; select kernels outside of experts"
            )
        if not path.endswith("kernel") or len(kernel.shape) != 2:
            raise ValueError(f"{path} {kernel.shape} is not a kernel [in, out]")
        size_in, size_out = kernel.shape
        if not 1 <= rank <= min(size_in, size_out):
            raise ValueError(
                f"rank {rank} for {path} {kernel.shape}: expected 1 to "
                f"{min(size_in, size_out)}"
            )
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.normal(leaf_key, (size_in, rank)) * size_in**-0.5
        kind = kernel.dtype if dtype is None else dtype
        b = jnp.zeros((rank, size_out), kind)
        _put(adapter, path, {"a": a.astype(kind), "b": b})
    return adapter


def apply(params: Params, adapter: Params, scale: Any) -> Params:
    """The model's parameters with `LowRank` leaves where the adapter has factors.

    Args:
      params: the model's parameters; shared, not copied.
      adapter: from `init`; several may be applied one after the other.
      scale: alpha / R, may be a tracer.

    Raises:
      ValueError: for factors of a kernel that the model has not, or of another shape.

    >>> params = {"q": {"kernel": jnp.eye(2)}}
    >>> adapter = {"q": {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}}
    >>> kernel = apply(params, adapter, 0.5)["q"]["kernel"]
    >>> project(jnp.array([1.0, 0.0]), kernel).tolist()
    [1.5, 0.5]
    """
    return _join(params, adapter, lambda kernel, a, b: LowRank(kernel, a, b, scale))


def materialise(params: Params, adapter: Params, scale: Any) -> Params:
    """The model's parameters with the adapter added: `kernel + scale * a @ b`.

    The product is taken in float32 and the sum rounded to the kernel's type.

    Args:
      params: the model's parameters.
      adapter: from `init`.
      scale: alpha / R.

    Raises:
      ValueError: for factors of a kernel that the model has not, or of another shape;
        for packed parameters.

    >>> params = {"q": {"kernel": jnp.eye(2)}}
    >>> adapter = {"q": {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}}
    >>> materialise(params, adapter, 0.5)["q"]["kernel"].tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """

    tree.refuse_packed(params, "merged with an adapter")

    def add(kernel, a, b):
        a, b, wide = (leaf.astype(jnp.float32) for leaf in (a, b, kernel))
        low = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
        return (wide + scale * low).astype(kernel.dtype)

    return _join(params, adapter, add)


def adapted_backbone(backbone: Backbone, scale: Any) -> Backbone:
    """The backbone whose parameters are `(params, adapter)`.

    Args:
      backbone: any backbone whose products go through `project`.
      scale: alpha / R, may be a tracer.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = transformer.init(jax.random.key(0), config)
    >>> both = (params, init(jax.random.key(1), params, rank=2))
    >>> expert = adapted_backbone(transformer.transformer(config), 2.0)
    >>> x = expert.embed(both, jnp.array([[1, 2]]))
    >>> expert.features(both, None, x)[0].hidden.shape
    (1, 2, 8)
    """

    def whole(both):
        params, adapter = both
        return apply(params, adapter, scale)

    return backbone._replace(
        init=lambda both, *args: backbone.init(whole(both), *args),
        embed=lambda both, *args: backbone.embed(whole(both), *args),
        features=lambda both, *args: backbone.features(whole(both), *args),
        unembed=lambda both, *args: backbone.unembed(whole(both), *args),
        branch=lambda both, *args: backbone.branch(whole(both), *args),
    )


def adapted(lm: LM, scale: Any) -> LM:
    """The LM whose parameters are `(params, adapter)`.

    `combine.stacked(adapted(lm, scale), n, pool, axes=(None, 0))` is an ensemble of n
    adapters which shares the base in one vmapped decode.

    Args:
      lm: the LM of a model whose products go through `project`.
      scale: alpha / R, may be a tracer.

    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models import transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = transformer.init(jax.random.key(0), config)
    >>> lm = language_model(transformer.transformer(config))
    >>> both = (params, init(jax.random.key(1), params, rank=2))
    >>> expert, tokens = adapted(lm, 2.0), jnp.array([[1, 2]])
    >>> out, _ = expert.extend(both, expert.init(both, 1, 2), tokens)
    >>> base, _ = lm.extend(params, lm.init(params, 1, 2), tokens)
    >>> bool((out.logits == base.logits).all())
    True
    """

    def whole(both):
        params, adapter = both
        return apply(params, adapter, scale)

    return lm._replace(
        init=lambda both, *args: lm.init(whole(both), *args),
        extend=lambda both, *args: lm.extend(whole(both), *args),
        branch=lambda both, *args: lm.branch(whole(both), *args),
    )


def _put(node: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value


def _join(params: Params, adapter: Params, f: Any, at: str = "") -> Params:
    """The params with f(kernel, a, b) where the adapter has factors."""
    joined = dict(params)
    for name, inner in adapter.items():
        path = f"{at}/{name}" if at else name
        if name not in params:
            raise ValueError(
                f"the adapter changes {path}, which the model has not; it was made for "
                "another architecture or another number of layers"
            )
        if set(inner) == {"a", "b"}:
            a, b, kernel = inner["a"], inner["b"], params[name]
            found = a.shape[:-1], b.shape[1:]
            size_in, size_out = _shape(kernel)
            if found != ((size_in,), (size_out,)) or a.shape[-1] != b.shape[0]:
                raise ValueError(
                    f"factors {a.shape} and {b.shape} do not fit the kernel {path} of "
                    f"shape {(size_in, size_out)}"
                )
            joined[name] = f(kernel, a, b)
        else:
            joined[name] = _join(params[name], inner, f, path)
    return joined


def _shape(kernel: Any) -> tuple[int, ...]:
    while isinstance(kernel, LowRank):
        kernel = kernel.kernel
    return kernel.shape
