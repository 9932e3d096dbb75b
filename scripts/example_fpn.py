"""A feature pyramid on a neighborhood attention backbone.

    python scripts/example_fpn.py [--model dinat_tiny] [--size 224]

The backbone's maps at strides 4, 8, 16 and 32 go through torchvision's feature pyramid network, as a detector or a
segmentation head would take them.
"""

import argparse
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

import zoo  # noqa: F401  (registers the models)


class PyramidBackbone(nn.Module):
    """A timm model as the backbone of a feature pyramid."""

    def __init__(self, name: str, out_channels: int = 256, pretrained: bool = False):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, pretrained=pretrained)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """[batch, 3, height, width] -> maps [batch, out_channels, height / stride, width / stride] by stride"""
        strides = self.body.feature_info.reduction()
        return self.fpn(OrderedDict((f"stride {s}", y) for s, y in zip(strides, self.body(x), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the shapes of a feature pyramid.")
    parser.add_argument("--model", default="dinat_tiny", help="name of the backbone")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels, any number")
    args = parser.parse_args()

    model = PyramidBackbone(args.model).eval()
    with torch.inference_mode():
        pyramid = model(torch.randn(1, 3, args.size, args.size))
    for name, y in pyramid.items():
        print(f"{name:>9}: {list(y.shape)}")


if __name__ == "__main__":
    main()
