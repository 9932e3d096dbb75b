"""Softmax in parts, for backends that keep the log-sum-exp."""

from torch import Tensor


def softmax_parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last axis with one exponential, where log-sum-exp and softmax would take two.

    Args:
        logits: [..., n], overwritten.

    Returns:
        The numerators [..., n], of which the largest is 1; their sums and the log-sum-exp of the logits, [..., 1].
    """
    top = logits.amax(dim=-1, keepdim=True)
    numerators = logits.sub_(top).exp_()
    total = numerators.sum(dim=-1, keepdim=True)
    return numerators, total, total.log().add_(top)
