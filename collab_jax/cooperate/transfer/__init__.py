"""Knowledge transfer at decode time: the laws of other models correct a model's own.

A method is a pool (`collab_jax.pool`) where it is a formula over the members' laws, so
that it serves `combine.product`, `combine.stacked` and a target that shares its draft
(`cooperate.efficient.reuse`) alike; an LM where it needs more than their logits. Base
first: the members stand in the order in which the method's formula names them.

- `contrast`, `context`, `layers`, `routing` mitigate incorrect knowledge: what a weaker
  model, the model without its context, its early layers or its other experts say too is
  subtracted;
- `offset`, `objectives`, `nudge`, `comblm`, `nearest` supply new knowledge: of a tuned
  small model, of several tuned models, or of a datastore;
- `reward`, with models of `models.reward`, strengthens what a reward speaks for;
  `reward_training` and `preference_training` make such rewards, `hanging` reads the
  candidates;
- `gate` lets the knobs of any pool depend on the laws.
"""
