"""Token-level ensembles of models whose tokenizers differ.

Every member keeps its tokenizer. The text stands in one vocabulary, the first member's
or a union of all (`collab_jax.io.union`); `translate.spelled` lets a member read it,
and its law then has to be brought from its own tokens to those of the text:

- `lift`: token by token; `carry` adds the mass of tokens that mean the same, `borrow`
  asks for the logit of another token. `warp(spelled(lm, bridge), lift)` is an LM over
  the text's tokens, and goes into any `product`;
- `union` (GaC) is the mean over a union of the vocabularies, `top_union` (UniTE) over
  the likeliest tokens alone;
- `edit_distance` (MinED) finds the token that is spelled most alike, `alignment` those
  whose output embeddings lie near, for `eva`;
- `relative` (DeePEn) pools in a space of similarities to tokens that all have;
- `perplexity` (PackLLM) weighs the members by how well they read the prompt.

Or no text's tokens are shared, and members meet in the bytes that theirs write
(`symbols`): `agreement` is beam search for strings on which all agree, `bytewise` draws
from their laws of the next byte.
"""
