"""Efficient inference: a cheap proposal that the target verifies.

Speculative decoding is three independent choices, each a value of pure functions:

- `draft`: what a `Proposer` returns and hears (`Draft`, `Verified`); `draft_model`
  makes a proposer of any LM;
- `target`: the law that the text is to follow (`Target`); `on_lm` makes one of any LM;
- `verify`: the coupling of both (`Verifier`); each exposes its law, `outcomes`.

`speculate` joins them to a `Decoder`, one jitted loop over ragged batches.
"""
