"""Suffix decoding against a plain walk over all occurrences."""

import jax.numpy as jnp
import naive_drafts as naive
import pytest
from drafting import histories, play

from collab_jax.cooperate.efficient.suffix import suffix

SETTINGS = [
    # depth, factor, offset, threshold, occurrences
    (24, 1.0, 0.0, 0.1, 32),
    (5, 2.0, 0.0, 0.1, 7),
    (8, 0.5, 1.0, 0.3, 100),
    (3, 0.0, 6.0, 0.0, 32),
    (1, 4.0, 0.0, 1.0, 1),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("alphabet", [2, 5])
def test_suffix_is_its_twin(settings, alphabet):
    depth, factor, offset, threshold, occurrences = settings
    proposer = suffix(
        6,
        depth,
        max_spec_factor=factor,
        max_spec_offset=offset,
        min_token_prob=threshold,
        occurrences=occurrences,
    )
    drafted = set()
    for seen, drafts in play(proposer, histories(depth, alphabet=alphabet)):
        for text, draft in zip(seen, drafts, strict=True):
            assert draft == naive.suffix(text, 6, *settings)
            drafted.add(len(draft))
    assert len(drafted) > (2 if factor else 1) or depth == 1


def draft_of(text, **rest):
    proposer = suffix(4, **rest)
    text, length = jnp.array([text]), jnp.array([len(text)])
    draft, _ = proposer.propose((), (), text, length, None)
    return draft.tokens[0, : int(draft.count[0])].tolist()


def test_the_majority_is_followed_not_the_latest():
    text = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]
    assert draft_of(text)[:1] == [3]
    assert draft_of(text, occurrences=1)[:1] == [4]


def test_a_divided_vote_ends_the_draft():
    """Shares are multiplied along the path; what is left of them decides."""
    text = [1, 5, 2, 8, 1, 5, 3, 9, 1, 5, 4, 7, 1]
    assert draft_of(text, min_token_prob=0.5) == [5]
    assert len(draft_of(text, min_token_prob=0.3)) == 4


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: suffix(0), "length = 0"),
        (lambda: suffix(4, 0), "depth = 0"),
        (lambda: suffix(4, occurrences=0), "occurrences = 0"),
        (lambda: suffix(4, min_token_prob=1.5), "min_token_prob = 1.5"),
        (lambda: suffix(4, 3, max_spec_factor=0.2), "not even a match of 3 tokens"),
    ],
)
def test_what_cannot_draft_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()
