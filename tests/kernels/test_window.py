"""Which queries see a key, against which keys a query sees."""

import pytest

from zoo.kernels.neighborhood.window import (
    CAUSAL,
    CLIPPED,
    SHIFTED,
    borders,
    class_length,
    first_query,
    last_query,
    window_end,
    window_start,
)


@pytest.mark.parametrize("border", [SHIFTED, CAUSAL, CLIPPED])
@pytest.mark.parametrize("kernel_size", range(1, 10))
def test_queries_of_a_key(kernel_size, border):
    """The queries that see a key run from its first to its last query."""
    strides, lengths = range(1, kernel_size + 1), range(kernel_size, 26)
    if border == CLIPPED:  # no stride, and the window may exceed the axis
        strides, lengths = [1], range(1, 26)
    for stride in strides:
        for length in lengths:
            args = length, kernel_size, stride, border
            bounds = []
            for key in range(length):
                sees = [q for q in range(length) if window_start(q, *args) <= key < window_end(q, *args)]
                first, last = first_query(key, *args), last_query(key, *args)
                assert list(range(first, last + 1)) == sees
                bounds.append((first, last))
            # Monotone, so the queries of a run of keys go from the first key's first to the last key's last.
            assert bounds == sorted(bounds) and [b for _, b in bounds] == sorted(b for _, b in bounds)


@pytest.mark.parametrize("kernel_size", range(1, 10))
def test_clipped_windows_are_centred_and_stay_inside(kernel_size):
    for length in range(1, 20):
        for query in range(length):
            args = query, length, kernel_size, 1, CLIPPED
            centred = range(query - kernel_size // 2, query - kernel_size // 2 + kernel_size)
            assert list(range(window_start(*args), window_end(*args))) == [key for key in centred if 0 <= key < length]


def test_a_flag_is_a_border():
    assert (SHIFTED, CAUSAL) == (False, True)
    assert borders((True, False), 0) == (CAUSAL, SHIFTED)
    assert borders((False, False), 3) == (CLIPPED, CLIPPED)


def test_class_lengths_add_up():
    for length in range(1, 30):
        for dilation in range(1, 8):
            lengths = [class_length(length, dilation, r) for r in range(dilation)]
            assert lengths == [len(range(r, length, dilation)) for r in range(dilation)]
