"""Prompt lookup against its plain twins, and against transformers."""

import jax.numpy as jnp
import naive_drafts as naive
import numpy as np
import pytest
from drafting import histories, play

from collab_jax.cooperate.efficient import ngram as ng


@pytest.mark.parametrize("longest", [1, 2, 5])
@pytest.mark.parametrize("alphabet", [2, 4])
def test_ngram_is_its_twin(longest, alphabet):
    texts = histories(longest, alphabet=alphabet)
    for shortest in {1, longest}:
        proposer = ng.ngram(6, longest, shortest)
        for seen, drafts in play(proposer, texts, alphabet=alphabet):
            for text, draft in zip(seen, drafts, strict=True):
                assert draft == naive.ngram(text, 6, longest, shortest)


@pytest.mark.parametrize("longest", [1, 2, 5])
@pytest.mark.parametrize("alphabet", [2, 4])
def test_prompt_lookup_is_its_twin(longest, alphabet):
    texts = histories(longest, alphabet=alphabet)
    for seen, drafts in play(ng.prompt_lookup(6, longest), texts, alphabet=alphabet):
        for text, draft in zip(seen, drafts, strict=True):
            assert draft == naive.prompt_lookup(text, 6, longest)


@pytest.mark.parametrize("longest", [2, 3])
def test_prompt_lookup_is_that_of_transformers(longest):
    torch = pytest.importorskip("torch")
    from transformers.generation import candidate_generator as theirs

    peer = theirs.PromptLookupCandidateGenerator(None, 5, longest, max_length=1000)
    proposer = ng.prompt_lookup(5, longest)
    for text in histories(7, rows=60, alphabet=4):
        tokens = jnp.asarray([text + [3] * (50 - len(text))])
        length = jnp.asarray([len(text)])
        draft, _ = proposer.propose((), (), tokens, length, None)
        found = peer.get_candidates(torch.tensor([text]))[0][0, len(text) :].tolist()
        assert draft.tokens[0, : int(draft.count[0])].tolist() == found


def test_the_last_tokens_do_not_match_themselves():
    """The mistake: the end of the text is always the latest of the longest matches."""
    text = jnp.array([[1, 2, 3, 4, 5, 0, 0]])
    assert not ng.agreement(text, jnp.array([5]), 3).any()
    careless = np.array(
        [all(text[0, j - i] == text[0, 5 - i] for i in (1, 2)) for j in range(2, 6)]
    )
    assert careless.any()


def test_a_loop_is_drafted_at_full_length():
    """Where the first match of transformers sees the loop once, and the latest less."""
    text, length = jnp.array([[9, 4, 4, 0, 0, 0, 0]]), jnp.array([3])
    draft, _ = ng.ngram(5).propose((), (), text, length, None)
    assert draft.tokens.tolist() == [[4] * 5]
    assert draft.count.tolist() == [5]
    assert ng.prompt_lookup(5).propose((), (), text, length, None)[0].count[0] == 1


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: ng.ngram(0), "length = 0"),
        (lambda: ng.ngram(-1), "length = -1"),
        (lambda: ng.ngram(2.0), "length = 2.0"),
        (lambda: ng.ngram(4, 0), "longest = 0"),
        (lambda: ng.ngram(4, 3, 0), "shortest = 0"),
        (lambda: ng.ngram(4, 2, 3), "shortest = 3 above longest = 2"),
        (lambda: ng.prompt_lookup(0), "length = 0"),
        (lambda: ng.prompt_lookup(3, -2), "longest = -2"),
    ],
)
def test_what_cannot_draft_is_refused(make, found):
    with pytest.raises(ValueError, match=found):
        make()
