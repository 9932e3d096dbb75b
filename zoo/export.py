"""``zoo export``: a model as a file that runs without us, checked against the model before it is there."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo import __version__
from zoo.backbones.biformer import RoutingAttention2d
from zoo.checkpoints import is_sharded
from zoo.classifier import load_trained
from zoo.errors import UserError
from zoo.files import check_output, naming_file
from zoo.lowering import written_out
from zoo.task import create_model

# Of the largest logit: what float32 may differ by where sums run in another order.
TOLERANCE = 1e-4
# Exporters want an upper bound.
MAX_BATCH = MAX_SIDE = 2**15


class Checked(NamedTuple):
    """What an exported file was compared on."""

    difference: float
    """The largest from the model, as a fraction of its largest logit."""
    shapes: list[tuple[int, int, int, int]]
    """Of the images."""


def run_export(
    source: str,
    format: str,
    output: str,
    image_size: int | None = None,
    dynamic_size: bool = False,
    pretrained: bool = False,
    weights: str | None = None,
) -> None:
    """Write the file and say how far it is from the model.

    Args:
        source: Name of a model, or a checkpoint of ``zoo fit``.
        format: onnx, torch-export or torchscript.
        output: Path of the file. It appears whole, and only after the checks.
        image_size: Side of the images, that of the model's own by default.
        dynamic_size: Whether images may also be of other heights and widths, multiples of the model's largest stride.
        pretrained: Whether a named model has its published weights.
        weights: File of the weights of a named model.
    """
    path = Path(output)
    check_installed(format)
    check_output(path)
    name, model = load_model(source, pretrained, weights)
    if not (pretrained or weights or Path(source).is_file()):
        print(f"{name} has random weights: --pretrained takes the published ones, --weights those of a file")
    checked = export(name, model, format, path, image_size, dynamic_size)
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in checked.shapes)
    print(f"{path}: {name} as {format}, {path.stat().st_size / 2**20:.1f} MiB")
    print(f"largest difference from the model: {checked.difference:.1e} of the largest logit, on images of {shapes}")


def check_installed(format: str) -> None:
    """Raise a :class:`UserError` where a package is missing that this format needs."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: `pip install 'attn-zoo[export]'`")


def load_model(source: str, pretrained: bool = False, weights: str | None = None) -> tuple[str, nn.Module]:
    """Name and model, in eval mode and on the CPU, of a model's name or of a checkpoint of ``zoo fit``."""
    path = Path(source)
    if not path.is_file() and not is_sharded(path):
        if path.suffix in (".ckpt", ".pth", ".pt", ".safetensors"):
            raise UserError(f"there is no file {source}; expected a model's name or a checkpoint of `zoo fit`")
        return source, create_model(source, None, None, pretrained, weights).eval()
    if pretrained or weights is not None:
        raise UserError(f"{source} is a checkpoint and has weights: leave out --pretrained and --weights")
    return load_trained(path)


def export(
    name: str, model: nn.Module, format: str, path: Path, image_size: int | None = None, dynamic_size: bool = False
) -> Checked:
    """Write `model`, which is in eval mode, to `path`. See :func:`run_export`.

    Raises:
        UserError: The model cannot be exported like this, its file computes something else, or cannot be written.
    """
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    side = image_size or config["input_size"][1]
    step = max((info["reduction"] for info in getattr(model, "feature_info", [])), default=32) if dynamic_size else 1
    if side < 1 or side % step:
        raise UserError(f"--image-size: expected a multiple of {step}, as other sizes will have to be, got {side}")
    if dynamic_size and format != "torchscript":
        refuse_any_size(name, model)
    about = {
        "model": name,
        "made by": f"attn-zoo {__version__}",
        "images": f"batch x {channels} x " + (f"multiples of {step}" if dynamic_size else f"{side} x {side}"),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    shapes = [(1, channels, side, side), (3, channels, side, side)]
    if dynamic_size:
        shapes += [(2, channels, step, side + step), (1, channels, side + 2 * step, step)]

    with naming_file(path, "--output: "), _drafts(path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about themselves
        suffix, write, load = _FORMATS[format]
        draft = folder / f"draft{suffix}"
        try:
            write(model, draft, torch.zeros(shapes[0]), step if dynamic_size else None, about)
        except OSError:
            raise
        except Exception as error:  # exporters raise many kinds
            size = "images of any size" if dynamic_size else f"images of {side} x {side}"
            raise UserError(f"{format} cannot hold {name} for {size}: {_first_line(error)}") from error
        if list(folder.iterdir()) != [draft]:
            raise UserError(f"{name} is larger than the 2 GiB that one file of format {format} can hold")
        checked = compare(model, load(draft), shapes)
        if not checked.difference <= TOLERANCE:
            raise UserError(
                f"{path} was not written: as {format}, {name} computes something else, by {checked.difference:.1e} "
                f"of its largest logit"
            )
        os.replace(draft, path)
    return checked


@contextmanager
def _drafts(parent: Path) -> Iterator[Path]:
    """A folder for a while, in ``parent``, so that what is in it can be moved there."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=".export-") as folder:
        yield Path(folder)


def refuse_any_size(name: str, model: nn.Module) -> None:
    """Raise a :class:`UserError` where the size of the images decides what the operators are."""
    if any(isinstance(module, RoutingAttention2d) for module in model.modules()):
        raise UserError(
            f"--dynamic-size: {name} cuts maps into a number of regions, and chooses a number of them, that depend on "
            "the size of the images in steps; export it for one size, or as torchscript"
        )


def compare(model: nn.Module, run: Callable[[Tensor], Tensor], shapes: list[tuple[int, int, int, int]]) -> Checked:
    """Difference of what `run` computes from the model on random images of these shapes."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected = model(images)
            actual = run(images)
        if actual.shape != expected.shape:
            raise UserError(
                f"the file returns {tuple(actual.shape)} for images of {shape}, not {tuple(expected.shape)}"
            )
        difference = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        worst = max(worst, difference.nan_to_num(float("inf")).item())
    return Checked(worst, shapes)


class _AnySize(nn.Module):
    """A model of images whose batch, and in steps of `step` tokens whose sides, are not known to who traces it.

    A symbol that comes from a tensor, unlike one that comes from a shape, cannot be compared with anything: the trace
    is right for every size, one or two of anything included, or it fails. Images of other sides fail to be reshaped.
    """

    def __init__(self, model: nn.Module, step: int | None):
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        batch = self.unknown(images.shape[0], MAX_BATCH)
        images = images.index_select(0, torch.arange(batch))  # reshaped to it, it would be known as the shape's symbol
        if self.step is not None:
            height, width = (self.unknown(n // self.step, MAX_SIDE // self.step) for n in images.shape[2:])
            images = images.reshape(batch, images.shape[1], height * self.step, width * self.step)
        return self.model(images)

    def unknown(self, size: int, largest: int) -> int:
        number = torch.scalar_tensor(size, dtype=torch.int64).item()
        torch._check(number >= 1)
        torch._check(number <= largest)
        return number


def trace(model: nn.Module, images: Tensor, step: int | None) -> torch.export.ExportedProgram:
    """The model in torch's own operators, for any batch and, unless `step` is None, any multiples of it as sides."""
    dims = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if step is not None:
        dims |= {
            i: step * Dim(f"{axis}_steps", min=1, max=MAX_SIDE // step) for i, axis in ((2, "height"), (3, "width"))
        }
        images = images.new_zeros(*images.shape[:2], 2 * step, 3 * step)
    images = images.expand(2, -1, -1, -1).contiguous()
    with torch.no_grad(), written_out():
        return torch.export.export(_AnySize(model, step), (images,), dynamic_shapes=(dims,), strict=False)


def _write_torch_export(model: nn.Module, path: Path, images: Tensor, step: int | None, about: dict[str, Any]) -> None:
    file = BytesIO()
    torch.export.save(trace(model, images, step), file, extra_files={"zoo.json": json.dumps(about)})
    path.write_bytes(file.getbuffer())


def _write_onnx(model: nn.Module, path: Path, images: Tensor, step: int | None, about: dict[str, Any]) -> None:
    from onnxscript import ir

    names = dict(input_names=["images"], output_names=["logits"])
    with sdpa_kernel(
        SDPBackend.MATH
    ):  # what the exporter writes attention as, laid out otherwise than fused kernels do
        written = torch.onnx.export(trace(model, images, step), dynamo=True, verbose=False, **names)
    size = images.shape[2:] if step is None else ("height", "width")
    written.model.graph.inputs[0].shape = ir.Shape(["batch", images.shape[1], *size])
    written.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    written.save(path)


def _write_torchscript(model: nn.Module, path: Path, images: Tensor, step: int | None, about: dict[str, Any]) -> None:
    file = BytesIO()  # given a path, torch's own writer ends the process when the disk is full
    torch.jit.save(torch.jit.script(model), file, _extra_files={"zoo.json": json.dumps(about)})
    path.write_bytes(file.getbuffer())


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_FORMATS = {
    "onnx": (".onnx", _write_onnx, _load_onnx),
    "torch-export": (".pt2", _write_torch_export, lambda path: torch.export.load(path).module()),
    "torchscript": (".pt", _write_torchscript, torch.jit.load),
}


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # an exporter's own errors are of pages
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
