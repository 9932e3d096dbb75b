"""``zoo eval-diffusion``: how far generated images are from real ones, in the features of any classifier."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.functional import to_pil_image

from zoo.bench import check_device
from zoo.classifier import Classifier, load_classifier, read_image
from zoo.data.image_folder import IMAGE_SUFFIXES
from zoo.errors import UserError, expect_at_least

NEIGHBORS = 3  # as the paper on precision and recall has it


class Distances(NamedTuple):
    """How far generated images are from real ones, by their features.

    Attributes:
        frechet: Fréchet distance (https://arxiv.org/abs/1706.08500). It falls with the numbers of images, so only
            figures of equal numbers are comparable.
        kernel: Kernel distance (https://arxiv.org/abs/1801.01401), the mean over subsets; its numbers do not matter.
        kernel_std: The standard deviation over the subsets.
        precision: Share of the generated images near a real one (https://arxiv.org/abs/1904.06991).
        recall: Share of the real images near a generated one.
    """

    frechet: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float


def run_eval_diffusion(
    generated: str,
    real: str,
    model: str | None,
    checkpoint: str | None,
    pretrained: bool,
    samples: int,
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int,
    device: str | None,
) -> None:
    """Measure and print."""
    expect_at_least(1, **{"--samples": samples, "--steps": steps, "--batch-size": batch_size})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    extractor = load_classifier(model, checkpoint, pretrained)
    reals = folder_images(Path(real))
    if any((Path(generated) / name).exists() for name in ("pipeline", "model_index.json")) or Path(generated).is_file():
        images = drawn_images(generated, samples, steps, guidance, seed)
        source = f"{samples} samples of {generated}: {steps} steps, guidance {guidance:g}, seed {seed}"
    else:
        images, source = folder_images(Path(generated)), f"images in {generated}"
    features = [extract(extractor, x, batch_size, device) for x in (images, reals)]
    distances = compare(*features, seed=seed)

    note = ", which has random weights: figures are comparable with the same weights only"
    print(f"{source}; {len(features[0])} of them beside {len(features[1])} in {real}")
    print(f"features of {extractor.name}{note if extractor.weights == 'random' else f', weights: {extractor.weights}'}")
    table = Table(show_header=False)
    table.add_row("Fréchet distance", f"{distances.frechet:.4g}")
    table.add_row("kernel distance", f"{distances.kernel:.4g} ± {distances.kernel_std:.2g}")
    table.add_row(f"precision ({NEIGHBORS} neighbours)", f"{distances.precision:.1%}")
    table.add_row(f"recall ({NEIGHBORS} neighbours)", f"{distances.recall:.1%}")
    Console().print(table)


def compare(generated: Tensor, real: Tensor, subset_size: int = 1000, seed: int = 0) -> Distances:
    """Distances of features [generated, features] from [real, features].

    Args:
        generated: Features of the generated images.
        real: Features of the real ones.
        subset_size: Images in each of the 100 subsets of the kernel distance; fewer where there are fewer.
        seed: Of the subsets.

    Raises:
        UserError: There are too few images.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= NEIGHBORS:
            raise UserError(f"expected more than {NEIGHBORS} {name} images, got {len(features)}")
    given = _Given(real.shape[1])
    frechet = FrechetInceptionDistance(given)
    kernel = KernelInceptionDistance(given, subset_size=min(subset_size, len(generated), len(real)))
    for metric in (frechet, kernel):
        metric.update(real.cpu(), real=True)
        metric.update(generated.cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = kernel.compute()
    return Distances(
        frechet.compute().item(), mean.item(), std.item(), coverage(generated, real), coverage(real, generated)
    )


def coverage(points: Tensor, of: Tensor) -> float:
    """Share of ``points`` within the manifold of the others: no further from one than its third neighbour is.

    Args:
        points: [n, features].
        of: [m, features].
    """
    points, of = points.double(), of.double()
    radii = torch.cat([torch.cdist(part, of).kthvalue(NEIGHBORS + 1).values for part in of.split(1000)])
    inside = [(torch.cdist(part, of) <= radii).any(1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


@torch.inference_mode()
def extract(extractor: Classifier, images: Iterable[Image.Image], batch_size: int, device: str) -> Tensor:
    """The features before the last layer, [images, features], in float64 on the CPU."""
    model = extractor.model.to(device)
    prepared = (extractor.prepare(image) for image in images)
    features = []
    while batch := list(islice(prepared, batch_size)):
        x = model.forward_features(torch.stack(batch).to(device))
        features.append(model.forward_head(x, pre_logits=True).flatten(1).double().cpu())
    return torch.cat(features) if features else torch.empty(0, model.num_features, dtype=torch.double)


def folder_images(folder: Path) -> Iterator[Image.Image]:
    """Every image in a folder and the folders in it; those that cannot be read are left out with a warning."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"there are no images in {folder}; expected files in {', '.join(sorted(IMAGE_SUFFIXES))}")

    def read() -> Iterator[Image.Image]:
        for path in paths:
            try:
                image = read_image(path)
            except UserError as error:
                warnings.warn(f"skipping {error}", stacklevel=2)
                continue
            yield image

    return read()


def drawn_images(source: str, count: int, steps: int, guidance: float, seed: int) -> Iterator[Image.Image]:
    """Samples of a trained flow, as many of one class as of any other."""
    from zoo.sample import load_pipeline, sample  # diffusers takes its time to import

    pipeline = load_pipeline(source)
    labels = [i % pipeline.denoiser.config.num_classes for i in range(count)]
    return (to_pil_image(image) for image in sample(pipeline, labels, steps, guidance, seed))


class _Given(nn.Module):
    """Stands for a feature extractor in torchmetrics where the features were extracted before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
