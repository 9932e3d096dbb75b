"""Index ranges of neighborhood attention along one axis; every backend and every rank uses these.

An axis of `length` tokens with dilation `d` splits into `d` residue classes: token `i` is member `i // d` of class
`i % d`. Attention never leaves a class, so everything below `class_length` speaks of members of one class.

The functions are plain integer arithmetic on purpose: they run on Python integers and, compiled as they are by
`triton.jit`, inside the fused kernels.
"""

from __future__ import annotations


def class_length(length, dilation, residue):
    """Number of tokens `i < length` with `i % dilation == residue`."""
    return (length - residue + dilation - 1) // dilation


def window_start(query, length, kernel_size, stride, is_causal):
    """First key that member `query` of a class of `length` members attends to.

    Queries in one group of `stride` share the window of the group's leader: its centre, or its last member where the
    axis is causal. Windows are shifted inwards at the borders, never shrunk, except that causal ones are cut there.
    """
    if is_causal:
        leader = min(query // stride * stride + stride - 1, length - 1)
        start = max(leader - kernel_size + 1, 0)
    else:
        leader = min(query // stride * stride + stride // 2, length - 1)
        start = min(max(leader - kernel_size // 2, 0), length - kernel_size)
    return start


def window_end(query, length, kernel_size, stride, is_causal):
    """One past the last key that member `query` of a class of `length` members attends to."""
    if is_causal:
        end = query + 1
    else:
        end = window_start(query, length, kernel_size, stride, is_causal) + kernel_size
    return end
