"""Layer norm of narrow tokens, in one pass over memory each way."""

from zoo.kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
