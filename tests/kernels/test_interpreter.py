"""tests/interpreter.py: what is done once gives what Triton's interpreter gives every time."""

import itertools
import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("compiled kernels need no interpreter", allow_module_level=True)
triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from tests.interpreter import KNOWN  # noqa: E402

if not triton.__version__.startswith(KNOWN):
    pytest.skip("nothing is replaced in this version", allow_module_level=True)

SEMANTIC = interpreter.interpreter_semantic
SLOW = type(SEMANTIC).__mro__[1](interpreter.interpreter_builder)
NUMBERS = [tl.int1, tl.uint8, tl.int32, tl.uint32, tl.int64]
NUMBERS += [tl.float16, tl.bfloat16, tl.float32, tl.float64]


def value(type_, shape=()):
    """A number, or a block of them, as a kernel holds it."""
    data = np.ones(shape or (1,), dtype=interpreter._get_np_dtype(type_))
    block = tl.block_type(type_, list(shape)) if shape else type_
    return tl.tensor(interpreter.TensorHandle(data, type_), block)


def outcome(function, *args, **named):
    """What a call returns, in plain values, or the error that it raises."""
    try:
        found = function(*args, **named)
    except Exception as error:
        return type(error), str(error)
    return [(str(t.type), t.handle.data.dtype, t.handle.data.tolist()) for t in found]


def operands():
    pointer = tl.pointer_type(tl.float32)
    places = interpreter.TensorHandle(np.zeros(4, dtype=np.uint64), pointer)
    yield tl.tensor(places, tl.block_type(pointer, [4]))
    yield tl.tensor(interpreter.TensorHandle(np.zeros(1, dtype=np.uint64), pointer), pointer)
    for type_ in NUMBERS:
        for shape in ((), (4,), (2, 1), (2, 4)):
            yield value(type_, shape)
    yield from (0, 1, -1, 127, 128, 2**31, 2**40, 2**63, -(2**31) - 1, 2**64, True, 0.0, 1.5, 1e300)


@pytest.mark.parametrize("options", [(), (True, True), (False, False, True, True)])
def test_operands_become_what_they_did(options):
    every = list(operands())
    assert len(every) > 50
    for left, right in itertools.product(every, every):
        if not isinstance(left, tl.tensor) and not isinstance(right, tl.tensor):
            continue
        slow = outcome(SLOW.binary_op_type_checking_impl, left, right, *options)
        quick = outcome(SEMANTIC.binary_op_type_checking_impl, left, right, *options)
        assert quick == slow, (left, right)


def test_types_of_results():
    for left, right in itertools.product(NUMBERS, NUMBERS):
        for flags in itertools.product((False, True), repeat=3):
            args = (left, flags[0], right, flags[1], flags[2])
            found = []
            for semantic in (SLOW, SEMANTIC, SEMANTIC):
                try:
                    found.append(semantic.computation_type_impl(*args))
                except TypeError as error:
                    found.append(str(error))
            assert found[0] == found[1] == found[2], args


def test_shapes_are_still_checked():
    for _ in range(2):
        block = tl.block_type(tl.int32, [tl.constexpr(2), 4])
        assert list(block.shape) == [2, 4] and block.numel == 8
        assert str(block) == "<['2', '4'], int32>" and block == tl.block_type(tl.int32, [2, 4])
        assert block != tl.block_type(tl.int64, [2, 4]) and block != tl.block_type(tl.int32, [4, 2])
        for shape, error in (
            ([2.0, 4], TypeError),
            ([3], ValueError),
            ([], TypeError),
            ([1 << 21], ValueError),
        ):
            with pytest.raises(error):
                tl.block_type(tl.int32, shape)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="exceeds"):
        interpreter.TensorHandle(np.zeros(1, dtype=np.int64), tl.int32)


@triton.jit
def sort_kernel(x_ptr, quick_ptr, network_ptr, network: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    keys = tl.load(x_ptr + offs)
    tl.store(quick_ptr + offs, tl.sort(keys))
    tl.store(network_ptr + offs, network(keys))


def test_keys_are_sorted_as_by_the_network():
    keys = torch.randint(-(2**62), 2**62, (64,))
    quick, network = torch.empty_like(keys), torch.empty_like(keys)
    sort_kernel[(1,)](keys, quick, network, tl.sort.network, 64)
    assert tl.sort.network is not tl.sort
    assert torch.equal(quick, network) and torch.equal(quick, keys.sort()[0])
