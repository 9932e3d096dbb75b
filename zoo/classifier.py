"""Classifiers by name or from a checkpoint, and single images as they take them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision.transforms import v2

import zoo  # noqa: F401  (registers our models)
from zoo.checkpoints import check_fits, read_checkpoint, read_lightning_checkpoint
from zoo.data import decode
from zoo.errors import UserError
from zoo.task import check_model_name, create_model, expect_data


@dataclass
class Classifier:
    """A model on the CPU, in evaluation mode, and what is known of it.

    Attributes:
        model: The model, without gradients of its parameters.
        name: Its name in timm.
        weights: Where its weights come from: "random", "published" or a file's name.
        classes: Names of its classes, where they are known.
    """

    model: nn.Module
    name: str
    weights: str
    classes: list[str] | None

    @property
    def data_config(self) -> dict[str, Any]:
        """Input size, mean, standard deviation, crop and interpolation that it expects, in timm's terms."""
        config = resolve_model_data_config(self.model)
        channels = getattr(self.model, "in_chans", 3)
        if len(config["mean"]) != channels:  # of a model for other than colour images
            config |= {key: (sum(config[key]) / len(config[key]),) * channels for key in ("mean", "std")}
        return config | {"input_size": (channels, *config["input_size"][1:])}

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as the model takes it, [channels, height, width]: resized, cropped and normalised."""
        config = self.data_config
        transform = create_transform(**config | {"input_size": (3, *config["input_size"][1:])}, normalize=False)
        pixels = transform(image.convert("RGB"))
        if pixels.dtype == torch.uint8:
            pixels = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        if config["input_size"][0] == 1:
            pixels = v2.functional.rgb_to_grayscale(pixels)
        return v2.functional.normalize(pixels, config["mean"], config["std"])

    def pixels(self, image: Tensor) -> Tensor:
        """What :meth:`prepare` gave, back as colours, [3, height, width], 0 to 1."""
        mean, std = (torch.tensor(self.data_config[key])[:, None, None] for key in ("mean", "std"))
        return (image * std + mean).clamp(0, 1).expand(3, -1, -1)


def load_classifier(name: str | None, checkpoint: str | Path | None = None, pretrained: bool = False) -> Classifier:
    """Make a model by name, with random or published weights or those of a file, or load what ``zoo fit`` trained.

    Args:
        name: Any name that ``timm.create_model`` takes; a checkpoint of ``zoo fit`` knows its own.
        checkpoint: A checkpoint of ``zoo fit``, or a file of weights in the authors' or in timm's format.
        pretrained: Download the published weights.

    Raises:
        UserError: There is no such model, the checkpoint is none or of another model, or there is nothing to load.
    """
    if checkpoint is None:
        if name is None:
            raise UserError("--model: expected a model's name, or --checkpoint with a checkpoint of `zoo fit`")
        model = create_model(name, _num_classes(name), pretrained=pretrained)
        weights, classes = "published" if pretrained else "random", None
    else:
        content = read_checkpoint(checkpoint)
        held = content.get("hyper_parameters", {}).get("model_name")
        classes = content.get("classes")
        if "pytorch-lightning_version" not in content:
            if name is None:
                raise UserError(f"--model: {checkpoint} holds weights alone, so the model's name is needed")
            model = create_model(name, _num_classes(name), checkpoint=str(checkpoint))
        elif name not in (None, held):
            raise UserError(f"{checkpoint} holds a {held}, but --model asks for {name}")
        else:
            name, model = load_trained(checkpoint)
        weights = Path(checkpoint).name
    if classes is None and getattr(model, "num_classes", None) == 1000:
        classes = [name.partition(",")[0] for name in ImageNetInfo().label_descriptions()]
    return Classifier(model.eval().requires_grad_(False), name, weights, classes)


def load_trained(path: str | Path) -> tuple[str, nn.Module]:
    """Name and model, in evaluation mode and on the CPU, of a checkpoint of ``zoo fit``.

    The weights are those that the run validated: averaged ones where it averaged them. The model expects images as the
    run had them.

    Raises:
        UserError: It is no checkpoint of a classifier, or damaged.
    """
    checkpoint = read_lightning_checkpoint(path)
    known = checkpoint.get("hyper_parameters", {})
    name = known.get("model_name")
    if name is None:
        raise UserError(f"{path} holds no classifier; expected a checkpoint of zoo.task.Classification")
    model = create_model(name, known.get("num_classes"), known.get("model_args"))
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    check_fits({"state_dict": weights}, model, path)
    model.load_state_dict(weights)
    expect_data(model, checkpoint)
    return name, model.eval()


def read_image(path: str | Path) -> Image.Image:
    """Read an image as the data modules do, with an error for users.

    Raises:
        UserError: It is missing, or no image that can be read.
    """
    try:
        return decode.read_image(path)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except Exception as error:  # image decoders raise nearly anything on damaged bytes
        raise UserError(f"{path} is not a readable image ({error})") from None


def _num_classes(name: str) -> int:
    check_model_name(name)
    cfg = get_pretrained_cfg(name) if timm.is_model(name) else None
    return 1000 if cfg is None else cfg.num_classes
