"""``zoo predict IMAGES``: what a classifier says of photographs, in a table."""

import logging
import warnings

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from zoo.classifier import Classifier, load_classifier
from zoo.data import PlainFolder, ReportSkipped
from zoo.evaluation import WritePredictions
from zoo.task import Classification


class Answers(LightningModule):
    """A classifier as Lightning's trainer runs it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model
        self.data_config = classifier.data_config

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    predict_step = Classification.predict_step


def run_predict(
    images: list[str],
    model: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    output: str = "predictions.csv",
    batch_size: int = 32,
    num_workers: int | None = None,
) -> None:
    """Name the likeliest class of every image, and write them all into a file.

    Args:
        images: Files, and folders with all that is below them.
        model: Any name that ``timm.create_model`` takes; a checkpoint of ``zoo fit`` knows its own.
        checkpoint: A checkpoint of ``zoo fit``, or a file of weights in the authors' or in timm's format.
        pretrained: Download the published weights.
        output: The file, which ends in .csv or .json; it is written when all images are done.
        batch_size: Images per batch.
        num_workers: Worker processes for loading; by default one per CPU core, at most 8.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # hints for those who write trainers
    write = WritePredictions(output)
    data = PlainFolder(images, batch_size=batch_size, num_workers=num_workers, max_unreadable=1.0)
    classifier = load_classifier(model, checkpoint, pretrained)
    write.classes = classifier.classes
    callbacks = [ReportSkipped(), write]
    trainer = Trainer(
        devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=callbacks
    )
    trainer.predict(Answers(classifier), data, return_predictions=False)
