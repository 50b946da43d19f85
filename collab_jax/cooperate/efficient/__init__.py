"""Efficient inference: a cheap proposal that the target verifies.

Speculative decoding is three independent choices, each a value of pure functions:

- `draft`: what a `Proposer` returns and hears (`Draft`, `Verified`); `draft_model` and
  `draft_tree` make proposers of any LM, `growth` and `topology` shape trees;
  `stopping`, `acceptance` and `budget` end drafts early; without a model draft `ngram`,
  `adaptive` and `suffix` from the text, `recycle` and `lookahead` from what the target
  said before; `parallel` and `feature_drafter` from its hidden states, trained by
  `parallel_training` and `feature_training`; `distill` trains a draft model;
- `target`: the law that the text is to follow (`Target`); `on_lm` makes one of any LM,
  `reuse` one in which the draft is a member, `early_exit` one that goes on from the
  draft's layers, `cascade` has laws between the two;
- `verify`: the coupling of both (`Verifier`), with its law, `outcomes`; `coupled` gives
  the tokens of plain sampling, `exact` those of greedy decoding, `tree` verifies trees.

`speculate` joins them to a `Decoder`, one jitted loop over ragged batches; `theory`
says what it is worth, and how long drafts should be. `universal` stands apart: a draft
of any tokenizer, whose text the host cuts anew in every round.
"""
