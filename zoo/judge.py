"""Judging samples of digits by a classifier that was trained apart from the flow."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from sklearn.model_selection import train_test_split
from torch import Tensor

from zoo.data import Digits
from zoo.diffusion import FlowPipeline
from zoo.sample import sample
from zoo.task import Classification


@dataclass
class Judgement:
    """What is said of the samples, each beside the same of real digits.

    Attributes:
        samples: Number of samples.
        steps: Steps from noise to image.
        guidance: Scale of classifier-free guidance.
        seed: Seed of the noise, and of how the real digits are halved.
        accuracy: Share of the samples that the classifier reads as the class asked for.
        real_accuracy: Share of held-out digits that it reads right.
        nearest: Euclidean distance in pixels of 0 to 1 to the nearest training digit, median.
        real_nearest: The same from held-out digits.
        near: Share of the samples nearer to a training digit than all but the nearest hundredth of held-out digits.
        frechet: Fréchet distance in the classifier's features to half of the real digits, of as many samples as the
            other half, with its classes.
        real_frechet: The same from that other half.
    """

    samples: int
    steps: int
    guidance: float
    seed: int
    accuracy: float
    real_accuracy: float
    nearest: float
    real_nearest: float
    near: float
    frechet: float
    real_frechet: float

    def table(self) -> Table:
        table = Table(title=f"{self.samples} samples: {self.steps} steps, guidance {self.guidance:g}, seed {self.seed}")
        table.add_column()
        table.add_column("samples", justify="right")
        table.add_column("real digits", justify="right")
        table.add_row(
            "read as the class asked for (right: held-out digits)", *_percent(self.accuracy, self.real_accuracy)
        )
        table.add_row(
            "distance to the nearest training digit, median (right: from held-out digits)",
            f"{self.nearest:.2f}",
            f"{self.real_nearest:.2f}",
        )
        table.add_row("nearer to one than 99 % of the held-out digits are", *_percent(self.near, 0.01))
        table.add_row(
            "Fréchet distance to half of the real digits (right: from the other half)",
            f"{self.frechet:.2f}",
            f"{self.real_frechet:.2f}",
        )
        return table


def judge_digits(
    pipeline: FlowPipeline, classifier: Classification, steps: int = 20, guidance: float = 1.0, seed: int = 0
) -> Judgement:
    """Sample digits from ``pipeline`` and compare them with the real ones.

    Args:
        pipeline: A flow trained on :class:`zoo.data.Digits` of one channel.
        classifier: Trained on :class:`zoo.data.Digits` of one channel, at its model's nominal size.
        steps: Steps from noise to image.
        guidance: Scale of classifier-free guidance.
        seed: Seed of the noise, and of how the real digits are halved.
    """
    digits = Digits(image_size=pipeline.denoiser.config.sample_size, channels=1, augment=False)
    (train, train_labels), (held_out, held_out_labels) = _stack(digits.train_set), _stack(digits.val_set)
    real, labels = torch.cat([train, held_out]), torch.cat([train_labels, held_out_labels])
    half, other = train_test_split(np.arange(len(real)), test_size=0.5, stratify=labels, random_state=seed)

    asked = labels[half]
    samples = sample(pipeline, asked.tolist(), steps, guidance, seed)
    features, predicted = read(classifier, samples)
    real_features, real_predicted = read(classifier, real)
    distances, real_distances = nearest(samples, train).values, nearest(held_out, train).values
    return Judgement(
        samples=len(samples),
        steps=steps,
        guidance=guidance,
        seed=seed,
        accuracy=(predicted == asked).double().mean().item(),
        real_accuracy=(real_predicted[len(train) :] == held_out_labels).double().mean().item(),
        nearest=distances.median().item(),
        real_nearest=real_distances.median().item(),
        near=(distances < real_distances.quantile(0.01)).double().mean().item(),
        frechet=frechet_distance(features, real_features[other]),
        real_frechet=frechet_distance(real_features[half], real_features[other]),
    )


@torch.inference_mode()
def read(classifier: Classification, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Return the classifier's features before its last layer and its answers.

    Args:
        classifier: The classifier.
        images: [n, 1, height, width], 0 to 1; enlarged as :class:`zoo.data.Digits` enlarges its scans.
        batch_size: Images per forward pass.

    Returns:
        [n, features] and [n].
    """
    model = classifier.model.eval()
    size = classifier.data_config["input_size"][-2:]
    features, answers = [], []
    for batch in images.split(batch_size):
        x = 2 * F.interpolate(batch, size=size, mode="bilinear", align_corners=False) - 1
        x = model.forward_features(x)
        features.append(model.forward_head(x, pre_logits=True))
        answers.append(model.forward_head(x).argmax(-1))
    return torch.cat(features), torch.cat(answers)


def nearest(images: Tensor, others: Tensor) -> torch.return_types.min:
    """For each image the nearest of the others: ``values``, Euclidean distances over all pixels, and ``indices``."""
    return torch.cdist(images.flatten(1).double(), others.flatten(1).double()).min(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between the normal distributions fitted to two sets of features, [n, features] each.

    As in the Fréchet Inception Distance (https://arxiv.org/abs/1706.08500): the squared distance of the means, plus
    the trace of `A + B - 2 sqrt(AB)` of the covariances.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The roots of the eigenvalues of AB are the singular values of sqrt(A) sqrt(B).
    root = torch.linalg.svdvals(_matrix_root(cov_a) @ _matrix_root(cov_b)).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def _matrix_root(matrix: Tensor) -> Tensor:
    """The root of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _stack(dataset) -> tuple[Tensor, Tensor]:
    """All images of a data set, [n, 1, height, width], 0 to 1, and their labels."""
    images, labels = zip(*dataset, strict=True)
    return (torch.stack(images) + 1) / 2, torch.stack(labels)


def _percent(*shares: float) -> list[str]:
    return [f"{share:.1%}" for share in shares]
