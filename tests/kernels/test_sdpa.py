"""Attention by torch's own kernels, with the bias as they want it."""

import pytest
import torch
from torch.testing import assert_close

from zoo.kernels._sdpa import aligned_rows, biased_attention


def test_the_bias_is_added_for_every_image():
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = (query @ key.mT * 0.3 + bias).softmax(-1) @ value
    assert_close(biased_attention(query, key, value, bias, 0.3), expected)
    assert_close(biased_attention(query, key, value, None, 0.3), (query @ key.mT * 0.3).softmax(-1) @ value)


@pytest.mark.parametrize("columns", [1, 9, 16, 50])
def test_rows_are_aligned(columns):
    bias = torch.randn(columns, 3, 2).mT.movedim(0, -1)  # columns are furthest apart
    out = aligned_rows(bias)
    assert torch.equal(out, bias)
    assert out.stride(-1) == 1 and out.stride(-2) % 16 == 0 and out.stride(-3) == 3 * out.stride(-2)
    assert out.stride(-2) > columns  # not dense
