"""Counting the IDs of a batch: against a dictionary, and against the stream's counters."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esapn.table_state import count_ids
from tests.esapn.tiny import USERS, tiny_stream


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), max_size=30),
    seen=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    history=st.integers(1, 4),
)
def test_counts_against_a_dictionary(ids, seen, history):
    found = count_ids(torch.tensor(ids, dtype=torch.int64), torch.tensor(seen).int(), history)
    count, left = dict(enumerate(seen)), Counter(ids)
    frequency, last, keep = [], [], []
    for i in ids:
        count[i] += 1
        left[i] -= 1
        frequency.append(count[i])
        last.append(left[i] == 0)
        keep.append(left[i] < history)
    assert found.frequency.tolist() == frequency
    assert found.last.tolist() == last and found.keep.tolist() == keep
    assert found.last.dtype == found.keep.dtype == torch.bool


def test_counts_of_the_search_are_those_of_the_stream():
    stream = tiny_stream(history=2)
    seen = torch.zeros(USERS, dtype=torch.int32)
    for index in range(len(stream.bounds)):
        batch = stream.batch(index)
        found = count_ids(batch.user, seen, 2)
        for mine, theirs in zip(
            found, (batch.user_freq, batch.user_last, batch.user_keep), strict=True
        ):
            assert torch.equal(mine.to(theirs.dtype), theirs)
        seen.index_add_(0, batch.user, torch.ones(50, dtype=torch.int32))
