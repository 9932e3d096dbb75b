"""Which queries see a key, against which keys a query sees."""

import pytest

from zoo.kernels.neighborhood.window import class_length, first_query, last_query, window_end, window_start


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel_size", range(1, 10))
def test_queries_of_a_key(kernel_size, is_causal):
    """The queries that see a key run from its first to its last query."""
    for stride in range(1, kernel_size + 1):
        for length in range(kernel_size, 26):
            args = length, kernel_size, stride, is_causal
            bounds = []
            for key in range(length):
                sees = [q for q in range(length) if window_start(q, *args) <= key < window_end(q, *args)]
                first, last = first_query(key, *args), last_query(key, *args)
                assert list(range(first, last + 1)) == sees
                bounds.append((first, last))
            # Monotone, so the queries of a run of keys go from the first key's first to the last key's last.
            assert bounds == sorted(bounds) and [b for _, b in bounds] == sorted(b for _, b in bounds)


def test_class_lengths_add_up():
    for length in range(1, 30):
        for dilation in range(1, 8):
            lengths = [class_length(length, dilation, r) for r in range(dilation)]
            assert lengths == [len(range(r, length, dilation)) for r in range(dilation)]
