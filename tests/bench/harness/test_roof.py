"""The byte models, by hand."""

from __future__ import annotations

from typing import Any

import torch
from harness import roof

from tests.bench.small import SMALL


def test_rows_of_the_paper() -> None:
    assert sum(roof.PAPER_ROWS.values()) == 138_493


def test_bytes_by_hand() -> None:
    # Three ids: one row of size 2 twice, one of 128.
    looked = roof.Looked([2, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1])
    plain = roof.Looked([0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 2], ragged=False)
    # 3 * (8 id + 4 location + 512 output) + 4 * 130 of rows; cold reads the small row twice.
    assert roof.forward_bytes(looked) == 2_092
    assert roof.forward_bytes(looked.cold) == 2_100
    # 3 * (8 id + 512 output) + 2 * 512 of rows
    assert roof.forward_bytes(plain) == 2_584
    # bf16 output: 256 bytes instead of 512
    assert roof.forward_bytes(looked, out_itemsize=2) == 2_092 - 3 * 256
    # 3 * (8 index + 512 gradient) + 8 of the row of size 2 + 800 of gradient
    assert roof.dense_backward_bytes(looked, 200) == 2_368
    assert roof.dense_backward_bytes(plain, 256) == 2_584
    # 3 * (8 index + 512 gradient) + rows read and written, 2 * 4 * 130
    assert roof.sparse_backward_bytes(looked, "sgd") == 1_560 + 1_040
    # and Adam's two moments read and written, and when each of 2 rows was last stepped
    assert roof.sparse_backward_bytes(looked, "adam") == 1_560 + 1_040 + 4 * 4 * 130 + 2 * 2 * 4
    assert roof.sparse_step_bytes(looked, "sgd") == 2_092 + 2_600
    # gradient read, weight read and written, two moments read and written: 7 * 4 bytes an element
    dense = roof.forward_bytes(looked) + roof.dense_backward_bytes(looked, 200)
    assert roof.dense_step_bytes(looked, "adam", 200) == dense + 28 * 200


def test_what_is_looked_up(spec: Any, ids: torch.Tensor) -> None:
    looked = roof.Looked.of(ids, spec.sizes)
    sizes = spec.sizes[ids].tolist()
    assert looked.counts == [sizes.count(d) for d in SMALL]
    assert looked.ids == len(ids)
    assert looked.elements == int(spec.sizes[ids.unique()].sum())


def test_state_and_promotion_bytes_by_hand() -> None:
    # Id 0 twice and id 2 once: three ids, two distinct rows, of sizes 2 and 128.
    looked = roof.Looked.of(torch.tensor([0, 2, 0]), torch.tensor([2, 64, 128]))
    assert (looked.counts, looked.distinct) == ([2, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1])
    # 3 * (8 index + 512 gradient), 130 elements with state read and written, 2 rows with theirs
    for rule, by_element, by_row in (("adagrad", 16, 0), ("rowwise_adagrad", 8, 8)):
        assert roof.sparse_backward_bytes(looked, rule) == 1_560 + 130 * by_element + 2 * by_row
    assert roof.sparse_backward_bytes(looked.cold, "sgd") == 1_560 + 132 * 8
    # Rows and output of 2 bytes: 3 * (8 + 4 + 256) + 2 * 130
    assert roof.forward_bytes(looked, 2, 2) == 1_064
    # id 8, location read and written 8, answer 1, last step 4; row of 2 read, row of 4 written,
    # two moments of 4 written: 21 + 8 + 16 + 32
    assert roof.promotion_bytes([1, 0, 0, 0, 0, 0]) == 77
    # twice from 64 to 128: 21 + 256 + 512 + 1,024; rows of 128 do not move
    assert roof.promotion_bytes([0, 0, 0, 0, 2, 9]) == 2 * 1_813


def test_products_by_hand() -> None:
    looked = roof.Looked([2, 0, 0, 0, 3, 5], [1, 0, 0, 0, 1, 1])
    assert roof.forward_flop(looked) == 2 * 128 * (2 * 2 + 3 * 64)
