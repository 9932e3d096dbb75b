"""``zoo demo``: train a small DiNAT and a small flow on handwritten digits by their recipes; draw what they learned."""

import logging
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from rich.console import Console
from rich.table import Table

from zoo.judge import judge_digits, nearest
from zoo.lightning_cli import RecipeCLI
from zoo.pictures import save_attention, save_confusion, save_curves, save_predictions, save_samples
from zoo.sample import load_pipeline, sample
from zoo.task import Classification

RECIPE = "digits/dinat"
FLOW_RECIPE = "digits/flow"
PICTURES = Path("runs/demo")


def run_demo(seed: int = 0) -> None:
    """Train, validate the last checkpoints, draw, and say where everything is."""
    # Lightning's hints on hardware and data loading are for real runs.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")

    console = Console()
    console.print(f"Training test_dinat on scikit-learn's handwritten digits: zoo fit --config {RECIPE}")
    start = time.perf_counter()
    cli = RecipeCLI(["fit", "--config", RECIPE, "--seed_everything", str(seed)])
    seconds = time.perf_counter() - start

    # The last checkpoint, not the best: choosing by validation accuracy would flatter it.
    run = Path(cli.trainer.log_dir)
    checkpoint = run / "checkpoints" / "last.ckpt"
    model = Classification.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu").eval()
    trainer = Trainer(logger=False, enable_model_summary=False)  # its own: validating must not add to the curves
    [metrics] = trainer.validate(model, cli.datamodule, verbose=False)
    pictures = draw(trainer, model, cli.datamodule, run / "metrics.csv", PICTURES)

    table = Table.grid(padding=(0, 2))
    table.add_row(
        "accuracy", f"{metrics['val_top1']:.1%} of {len(cli.datamodule.val_set)} held-out digits, after {seconds:.0f} s"
    )
    table.add_row("checkpoint", str(checkpoint))
    table.add_row("metrics", str(run / "metrics.csv"))
    for path in pictures:
        table.add_row("picture", str(path))
    console.print()
    console.print(table)
    console.print()
    demonstrate_flow(console, model, seed)


def demonstrate_flow(console: Console, classifier: Classification, seed: int) -> None:
    """Train the flow, judge its samples by the classifier, draw some, and say where everything is."""
    console.print(f"Training rectified flow on the same digits: zoo fit --config {FLOW_RECIPE}")
    start = time.perf_counter()
    cli = RecipeCLI(["fit", "--config", FLOW_RECIPE, "--seed_everything", str(seed)])
    seconds = time.perf_counter() - start
    run = Path(cli.trainer.log_dir)
    pipeline = load_pipeline(run)
    judgement = judge_digits(pipeline, classifier, seed=seed)

    classes = cli.datamodule.classes
    images = sample(pipeline, [*range(len(classes))] * 8, judgement.steps, judgement.guidance, seed)
    train = torch.stack([image for image, _ in cli.datamodule.train_set]) / 2 + 0.5
    picture = PICTURES / "samples.png"
    save_samples(
        picture,
        images,
        train[nearest(images, train).indices],
        list(classes),
        f"Drawn from noise, a class per column; {judgement.accuracy:.1%} of {judgement.samples} such are read as asked",
    )

    table = Table.grid(padding=(0, 2))
    table.add_row("training", f"{seconds:.0f} s")
    table.add_row("pipeline", str(run / "pipeline"))
    table.add_row("more samples", f"zoo sample {run}")
    table.add_row("picture", str(picture))
    console.print()
    console.print(judgement.table())
    console.print(table)


def draw(
    trainer: Trainer, model: Classification, data: LightningDataModule, metrics_csv: Path, folder: Path
) -> list[Path]:
    """Draw all pictures of ``model`` into ``folder``, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = trainer.predict(model, data)
    probabilities = torch.cat([batch["probabilities"] for batch in batches])
    images = torch.stack([image for image, _ in data.val_set])
    labels = torch.stack([label for _, label in data.val_set])
    predicted = probabilities.argmax(-1)

    paths = [folder / f"{name}.png" for name in ("predictions", "confusion", "curves", "attention")]
    save_predictions(paths[0], images, labels, probabilities, data.classes)
    save_confusion(paths[1], labels, predicted, data.classes)
    save_curves(paths[2], metrics_csv)
    index = int((predicted == labels).nonzero()[0])
    image = images[index]
    pixel = inked_pixel(image[0])
    save_attention(
        paths[3],
        model.model.cpu(),
        image,
        pixel,
        f"A {labels[index]}: what the token framed in blue attends to (darker red: more)",
    )
    return paths


def inked_pixel(image: torch.Tensor) -> tuple[int, int]:
    """Return the inked pixel nearest to the centre of an image [height, width]."""
    height, width = image.shape
    inked = (image > image.max() - 0.25 * (image.max() - image.min())).nonzero()
    centre = torch.tensor([height / 2, width / 2])
    y, x = inked[(inked - centre).norm(dim=1).argmin()].tolist()
    return y, x
