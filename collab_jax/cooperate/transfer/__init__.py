"""Knowledge transfer at decode time: the laws of other models correct a model's own.

A method is a pool (`collab_jax.pool`) where it is a formula over the members' laws, so
that it serves `combine.product`, `combine.stacked` and a target that shares its draft
(`cooperate.efficient.reuse`) alike; an LM where it needs more than their logits. Base
first: the members stand in the order in which the method's formula names them.

- `contrast`, `context`, `layers`, `routing` mitigate incorrect knowledge: what a weaker
  model, the model without its context, its early layers or its other experts say too is
  subtracted;
- `reward`, `future`, `diver` strengthen correct knowledge: candidates, or whole spans,
  are judged by a reward, by what should follow, or by the source; `reward_training` and
  `preference_training` make the models of rewards, `hanging` reads the candidates;
- `chunk_search` draws chunks of text and keeps those that a reward, or the tuning of a
  small model, prefers;
- `offset`, `objectives`, `nudge`, `nudge_words`, `comblm`, `nearest` supply new
  knowledge: of a tuned small model, of several tuned models, or of a datastore;
- `gate` lets the knobs of any pool depend on the laws.
"""
