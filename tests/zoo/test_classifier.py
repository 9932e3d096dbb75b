"""Classifiers from checkpoints of `zoo fit`: which weights they have, and how they take images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image

from zoo import export
from zoo.classifier import load_classifier
from zoo.data import Digits
from zoo.task import Classification
from zoo.training import SaveProgress


def test_a_run_with_averaged_weights(tmp_path):
    """What the run validated is what is loaded, with images as the run had them."""
    torch.manual_seed(0)
    data = Digits(image_size=32, channels=1, batch_size=16)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        callbacks=[EMAWeightAveraging(decay=0.5), SaveProgress()],
    )
    trainer.fit(Classification("test_dinat", num_classes=10, model_args={"in_chans": 1}, lr=1e-2), data)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert not torch.equal(
        checkpoint["state_dict"]["model.head.bias"], checkpoint["current_model_state"]["model.head.bias"]
    )

    classifier = load_classifier(None, path)
    images, labels = next(iter(data.val_dataloader()))
    loss = F.cross_entropy(classifier.model(images), labels)
    assert loss.item() == pytest.approx(trainer.callback_metrics["val_loss"].item(), abs=1e-6)
    name, model = export.load_model(str(path))
    assert name == "test_dinat"
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{key}"]), key

    assert classifier.classes == list("0123456789")
    assert classifier.data_config["input_size"] == (1, 32, 32)
    scan = Image.fromarray(((images[0, 0] + 1) * 127.5).round().numpy().astype(np.uint8))
    assert (classifier.prepare(scan) - images[0]).abs().max() <= 1.1 / 255
    torch.testing.assert_close(classifier.pixels(images[0]), ((images[0] + 1) / 2).expand(3, -1, -1))

    again = Classification.load_from_checkpoint(path, weights_only=True)
    assert again.data_config["mean"] == (0.5,)
