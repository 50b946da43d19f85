"""Public checks: does a model, a strategy of yours, obey the laws?

`check_lm` runs a language model through the five laws that every loop of the library
relies on, jitted and not. A new model or combinator that passes it composes with all
others.

Shapes: B rows, T tokens, N nodes of a tree, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import slots
from collab_jax.lm import LM, Params, branch_by_rows


class _Trial(NamedTuple):
    """An LM under test with its inputs; logits are compared by `agree`."""

    lm: LM
    params: Params
    batch: int
    capacity: int
    text: np.ndarray  # [B, T]; cut in NumPy, so that nothing is compiled for a cut
    junk: np.ndarray  # [B, T2]
    probe: np.ndarray  # [B, 2]
    tolerance: float
    decided: Callable[..., Any] | None

    def empty(self):
        return self.lm.init(self.params, self.batch, self.capacity)

    def after(self, state, tokens):
        """(logits, state) after some tokens."""
        out, state = self.lm.extend(self.params, state, jnp.asarray(tokens))
        return np.asarray(out.logits), state

    def agree(self, law: str, found, expected, where=True) -> None:
        """Fails when two arrays of logits differ by more than rounding."""
        found, expected = np.asarray(found), np.asarray(expected)
        where = np.broadcast_to(np.asarray(where), found.shape[:-1])
        same_support = (np.isneginf(found) == np.isneginf(expected)).all(-1)
        finite = np.isfinite(expected) & np.isfinite(found)
        scale = np.std(expected[np.isfinite(expected)]) if finite.any() else 1.0
        with np.errstate(invalid="ignore"):
            gap = np.where(finite, np.abs(found - expected), 0.0).max(-1)
        nan = (np.isnan(found) != np.isnan(expected)).any(-1)
        wrong = (
            ~same_support | (gap > self.tolerance * max(scale, 1e-30)) | nan
        ) & where
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"law of {law}: logits at {at} differ by {gap[at]:.3g} (standard "
                f"deviation {scale:.3g}, tolerance {self.tolerance:.0e} of it, "
                f"{'equal' if same_support[at] else 'unequal'} supports)"
            )

    def same_future(self, law: str, state, reference, where=True) -> None:
        """Fails when two states answer the probe differently, in a row or a tree."""
        mask = np.broadcast_to(np.asarray(where), (self.batch,))[:, None]
        found, _ = self.after(state, self.probe)
        expected, _ = self.after(reference, self.probe)
        self.agree(law, found, expected, mask)


def check_lm(
    lm: LM,
    params: Params,
    vocab: int,
    *,
    batch: int = 3,
    seed: int = 0,
    tolerance: float = 1e-5,
    decided: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    jit: bool | None = None,
) -> None:
    """Checks the five laws of an LM: chunk, rewind, rows, take and branch.

    1. chunk: `extend(a); extend(b)` = `extend(a ++ b)`;
    2. rewind: `extend(x); rewind(|x|)` leaves no trace;
    3. rows: each row advances and rewinds alone, whatever the others do;
    4. take: gathering rows commutes with extending them;
    5. branch: the logits at a node are those after its root path; `branch; prune(path)`
       is `extend(tokens[path])`; `prune(count 0)` leaves no trace.

    Two states are equal when they answer a probe with equal logits.

    Args:
      lm: the LM under test.
      params: its parameters, for `batch` rows where they have a row axis.
      vocab: V; random tokens below it are fed.
      batch: B, at least 2.
      seed: of the random tokens and trees.
      tolerance: largest difference, in standard deviations of the logits; 0 is bitwise.
      decided: for laws that decide discontinuously (greedy, top-k): from the parameters
        and tokens `[B, T]` to `[B, T]` bool, True where the deciding margin is wide
        enough for the chunk law to be owed. The default owes it everywhere.
      jit: check jitted (True), not (False), or both (None).

    Raises:
      AssertionError: naming the law, the position and the difference.

    >>> from collab_jax.models import table
    >>> params = table.init(jax.random.key(0), vocab=5, order=2)
    >>> check_lm(table.language_model(order=2), params, vocab=5, tolerance=0, jit=True)
    """
    if batch < 2:
        raise ValueError(
            f"batch = {batch}: at least 2 rows are needed to tell them apart"
        )
    keys = jax.random.split(jax.random.key(seed), 3)

    def tokens(key, width):
        return np.asarray(jax.random.randint(key, (batch, width), 0, vocab))

    for jitted in (False, True) if jit is None else (jit,):
        trial = _Trial(
            _jitted(lm) if jitted else lm,
            params,
            batch,
            capacity=24,
            text=tokens(keys[0], 7),
            junk=tokens(keys[1], 4),
            probe=tokens(keys[2], 2),
            tolerance=tolerance,
            decided=decided,
        )
        for law in (_chunk, _rewind, _rows, _take, _branch):
            law(trial)


def _jitted(lm: LM) -> LM:
    return lm._replace(
        extend=jax.jit(lm.extend),
        rewind=jax.jit(lm.rewind),
        take=jax.jit(lm.take),
        branch=jax.jit(lm.branch),
        prune=jax.jit(lm.prune),
    )


def _chunk(trial: _Trial) -> None:
    whole, reference = trial.after(trial.empty(), trial.text)
    owed = True
    if trial.decided is not None:
        owed = trial.decided(trial.params, trial.text)
    for cuts in ((3,), (1, 2), (1, 1, 1, 1)):
        state, pieces, start = trial.empty(), [], 0
        for width in (*cuts, trial.text.shape[1] - sum(cuts)):
            piece = trial.text[:, start : start + width]
            logits, state = trial.after(state, piece)
            pieces.append(logits)
            start += width
        trial.agree("chunk", np.concatenate(pieces, 1), whole, owed)
        trial.same_future("chunk", state, reference)


def _rewind(trial: _Trial) -> None:
    _, reference = trial.after(trial.empty(), trial.text)
    _, longer = trial.after(reference, trial.junk)
    count = jnp.full(trial.batch, trial.junk.shape[1])
    trial.same_future("rewind", trial.lm.rewind(longer, count), reference)
    total = jnp.full(trial.batch, trial.text.shape[1] + trial.junk.shape[1])
    trial.same_future("rewind", trial.lm.rewind(longer, total), trial.empty())


def _rows(trial: _Trial) -> None:
    whole, state = trial.after(trial.empty(), trial.text)
    # what is left is as long as the pieces of the chunk law: no new shapes
    count = np.array([0, 3, 5])[np.arange(trial.batch) % 3]
    ragged = trial.lm.rewind(state, jnp.asarray(count))
    found, _ = trial.after(ragged, trial.probe)
    for row in range(trial.batch):
        kept = trial.text.shape[1] - int(count[row])
        # the row alone keeps its text; every other row reads something else
        others = np.flip(trial.text, 1).copy()
        others[row] = trial.text[row]
        logits, alone = trial.after(trial.empty(), others[:, :kept])
        trial.agree("rows", logits[row], whole[row, :kept])
        expected, _ = trial.after(alone, trial.probe)
        trial.agree("rows", found[row], expected[row])


def _take(trial: _Trial) -> None:
    _, state = trial.after(trial.empty(), trial.text)
    # some rows are shorter, one is taken twice, and the batch grows
    state = trial.lm.rewind(state, jnp.arange(trial.batch) % 3)
    rows = np.array([trial.batch - 1, *range(trial.batch), 0])
    logits, after = trial.after(state, trial.probe)
    taken, taken_after = trial.after(
        trial.lm.take(state, jnp.asarray(rows)), trial.probe[rows]
    )
    trial.agree("take", taken, logits[rows])
    found, _ = trial.after(taken_after, trial.probe[rows])
    expected, _ = trial.after(after, trial.probe)
    trial.agree("take", found, expected[rows])


def _branch(trial: _Trial) -> None:
    _, state = trial.after(trial.empty(), trial.text)
    state = trial.lm.rewind(state, jnp.arange(trial.batch) % 3)
    parents, path, depth = _trees(trial.batch)
    nodes = jnp.asarray(np.concatenate([trial.junk, trial.probe], 1))
    out, branched = trial.lm.branch(trial.params, state, nodes, parents)
    oracle = branch_by_rows(trial.lm)
    start = oracle.init(trial.params, trial.batch, 1)._replace(state=state, nodes=())
    expected, _ = oracle.branch(trial.params, start, nodes, parents)
    trial.agree("branch", out.logits, expected.logits)
    empty = jnp.zeros(trial.batch, jnp.int32)
    trial.same_future("branch (prune 0)", trial.lm.prune(branched, path, empty), state)
    for count in (depth, depth - 1, jnp.arange(trial.batch) % (depth + 1)):
        pruned = trial.lm.prune(branched, path, count)
        kept = jnp.take_along_axis(nodes, path, axis=1)
        _, extended = trial.after(state, kept)
        reference = trial.lm.rewind(extended, path.shape[1] - count)
        trial.same_future("branch (prune)", pruned, reference)
    from_empty, _ = trial.lm.branch(trial.params, trial.empty(), nodes, parents)
    begin = start._replace(state=trial.empty())
    expected, _ = oracle.branch(trial.params, begin, nodes, parents)
    trial.agree("branch (empty prefix)", from_empty.logits, expected.logits)


def _trees(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Different trees of 6 nodes, with a root path of 3 nodes each."""
    kinds = np.array(
        [
            [-1, -1, 0, 0, 2, 1],  # two roots; 0 -> 2 -> 4
            [-1, 0, 1, 0, 1, 3],  # one root; 0 -> 1 -> 4
            [-1, 0, -1, 2, 3, 2],  # second root; 2 -> 3 -> 4
        ]
    )
    paths = np.array([[0, 2, 4], [0, 1, 4], [2, 3, 4]])
    pick = np.arange(batch) % len(kinds)
    parents, path = jnp.asarray(kinds[pick]), jnp.asarray(paths[pick])
    reach = slots.ancestors(parents)
    assert bool(jnp.take_along_axis(reach[:, 4], path, 1).all())
    return parents, path, jnp.full(batch, path.shape[1])
