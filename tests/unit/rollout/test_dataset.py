"""Fine-tuning: the data set's responses as samples."""

import pytest
from rollout_fakes import EOS, LetterTokenizer

from slime_opd.errors import DataError
from slime_opd.rollout.dataset import dataset_groups
from slime_opd.types import Prompt, RolloutBatch, Status


def test_each_prompt_becomes_a_group_of_its_own_response():
    given = [Prompt(4, (1, 2), "ab", response_tokens=(2, 3, 27)), Prompt(5, (1,), "a", response_tokens=(3,))]
    groups = dataset_groups(given, LetterTokenizer())
    assert [group.prompt.index for group in groups] == [4, 5]
    [sample] = groups[0].samples
    assert (sample.tokens, sample.response, sample.status) == ((1, 2, 2, 3, 27), "bc", Status.COMPLETED)
    batch = RolloutBatch.from_samples([sample for group in groups for sample in group.samples])
    assert batch.response_lengths.tolist() == [3, 1]
    assert {name: values.tolist() for name, values in batch.columns.items()} == {
        "loss_mask": [1, 1, 1, 1],
        "group": [4, 5],
        "truncated": [0, 0],
    }


def test_a_prompt_without_a_response_is_an_error():
    with pytest.raises(DataError, match="prompt 4 has no response"):
        dataset_groups([Prompt(4, (1, EOS), "a")], LetterTokenizer())
