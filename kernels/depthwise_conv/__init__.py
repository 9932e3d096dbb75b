"""The depthwise convolution beside an attention, added to its output in the same pass over memory."""

from zoo.kernels.depthwise_conv.api import add_depthwise_conv

__all__ = ["add_depthwise_conv"]
