"""The image classification task: any timm model, trained and evaluated by Lightning."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from timm.data import Mixup, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

import zoo  # noqa: F401  (registers our models, also where a checkpoint is loaded outside the command line)
from zoo.checkpoints import read_checkpoint
from zoo.errors import UserError, expect_at_least
from zoo.evaluation import Evaluation, accuracies

CUDA_GRAPHS = "reduce-overhead", "max-autotune"  # the modes of torch.compile that make some


class Classification(LightningModule):
    """Train a timm model with linear warm-up and a cosine schedule.

    Args:
        model_name: Any name that ``timm.create_model`` takes.
        num_classes: Number of classes; the command line takes it from the data.
        model_args: Further arguments for ``timm.create_model``, such as ``drop_path_rate`` or ``in_chans``.
        pretrained: Start from the published weights.
        checkpoint: Start from this weights file, in the authors' or in timm's format, instead of downloading.
        lr: Peak learning rate, for the whole batch: it is not scaled by batch size or number of devices.
        min_lr: Learning rate at the end of the cosine.
        optimizer: timm's name of an optimizer, such as ``adamw``, ``sgd`` (with Nesterov's momentum) or ``lamb``.
        weight_decay: Applied to matrices and kernels; biases, norms and what the model exempts are left alone.
        warmup_epochs: Epochs (or part of one) over which the learning rate rises from zero.
        label_smoothing: Used in training only.
        mixup: Strength (alpha) of mixup, 0 for none.
        cutmix: Strength (alpha) of CutMix, 0 for none; with both, each batch gets one of them.
        compile: Run the model through ``torch.compile``, perhaps in a mode such as ``reduce-overhead``: CUDA graphs.
        channels_last: Keep images and convolutions in channels-last memory, which fast convolutions on GPUs want.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them: less memory, slower.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        lr: float = 1e-3,
        min_lr: float = 0.0,
        optimizer: str = "adamw",
        weight_decay: float = 0.05,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        compile: bool | str = False,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        expect_at_least(2, num_classes=num_classes)
        expect_at_least(0, mixup=mixup, cutmix=cutmix, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing: expected 0 to 1, got {label_smoothing:g}")
        # Where the first weights came from is left out: a trained checkpoint must not fetch or need them again. So is
        # how it was run, which is for each machine to say.
        self.save_hyperparameters(ignore=["pretrained", "checkpoint", "compile", "channels_last", "grad_checkpointing"])
        self.model = create_model(model_name, num_classes, model_args, pretrained, checkpoint)
        if grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if compile:
            # In place, so that the names of the weights stay.
            self.model.compile(mode=None if compile is True else compile)
        self.cuda_graphs = compile in CUDA_GRAPHS
        self.lr = lr
        self.min_lr = min_lr
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.label_smoothing = label_smoothing
        if not 0 <= min_lr <= lr:
            raise UserError(f"min_lr: expected 0 to lr, which is {lr:g}, got {min_lr:g}")
        if optimizer not in list_optimizers():
            raise UserError(
                f"optimizer: timm knows no {optimizer!r}; timm.optim.list_optimizers() lists those it knows"
            )
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

        self.train_accuracy = MetricCollection(accuracies(num_classes), prefix="train_")
        self.val_evaluation = Evaluation(num_classes, "val_")
        self.test_evaluation = Evaluation(num_classes, "test_")

    @property
    def data_config(self) -> dict[str, Any]:
        """Input size, mean, standard deviation, crop and interpolation the model expects, in timm's terms."""
        return resolve_model_data_config(self.model)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix is None:
            logits = self(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            self.train_accuracy.update(logits, labels)
            self.log_dict(self.train_accuracy, on_step=False, on_epoch=True)
        else:  # a mixed image has no single right class, so there is no accuracy to log
            images, targets = self.mix(images, labels)
            loss = F.cross_entropy(self(images), targets)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(labels))
        return loss

    def on_after_backward(self) -> None:
        # What a CUDA graph gives becomes .grad where it lies, and the graph's next replay overwrites it: too soon while
        # batches are accumulated. So copy, by few kernels. Gradients of sharded weights, DTensors, are FSDP's own.
        params = [x for x in self.parameters() if type(x.grad) is Tensor] if self.cuda_graphs else []
        if params:
            for x, grad in zip(params, torch._foreach_mul([x.grad for x in params], 1)):
                x.grad = grad

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_evaluation)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_evaluation)

    def _evaluate(self, batch: Sequence[Tensor], evaluation: Evaluation) -> None:
        images, labels, *right = batch
        for figures in evaluation.update(self(images), labels, *right):
            self.log_dict(figures, prog_bar=True, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.val_evaluation.write(self.trainer)

    def on_test_epoch_end(self) -> None:
        self.test_evaluation.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # So that images can be prepared alike, and predictions named, wherever it is loaded.
        classes, config = (getattr(self.trainer.datamodule, name, None) for name in ("classes", "data_config"))
        if classes is not None:
            checkpoint["classes"] = list(classes)
        if config is not None:
            checkpoint["data_config"] = dict(config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expect_data(self.model, checkpoint)

    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int) -> dict[str, Any]:
        """Return each image's class probabilities, its most likely class and, where the data names images, its name."""
        images, names = batch if isinstance(batch, (list, tuple)) else (batch, None)
        probabilities = self(images).float().softmax(-1)
        if names is not None and "" in (names := list(names)):  # without a name it stands for no image
            probabilities = probabilities[[name != "" for name in names]]
            names = [name for name in names if name != ""]
        probability, label = probabilities.max(-1)
        return {"name": names, "label": label, "probability": probability, "probabilities": probabilities}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create_optimizer_v2(self.model, opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        return cosine_schedule(self.trainer, optimizer, self.warmup_epochs, self.min_lr)


def expect_data(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Let ``model`` expect images as those that it was trained on, where the checkpoint of the run says how they were.

    timm's ``resolve_model_data_config`` tells afterwards.
    """
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **checkpoint.get("data_config", {})}


def cosine_schedule(
    trainer: Trainer, optimizer: Optimizer, warmup_epochs: float, min_lr: float = 0.0
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for linear warm-up to the optimizer's rate and a cosine to ``min_lr``."""
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        raise UserError("the cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    trainer.fit_loop.setup_data()  # counts the batches, which nothing has where max_steps alone ends the training
    warmup = round(warmup_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    lr = optimizer.defaults["lr"]
    end = min_lr / lr if lr else 0.0

    def factor(step: int) -> float:
        return warmup_cosine(step, warmup, int(total), end)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def warmup_cosine(step: int, warmup: int, total: int, end: float = 0.0) -> float:
    """Factor of the peak learning rate at ``step``: a line up over ``warmup`` steps, then a cosine to ``end``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_model_name(model_name: str) -> None:
    """Raise a :class:`UserError` unless timm knows such a model; names with a source wait until they are looked up."""
    if ":" in model_name:  # as "hf-hub:..." has
        return
    arch, _, tag = model_name.partition(".")
    if not timm.is_model(arch):
        close = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"model_name: timm knows no model {model_name!r}{hint} (`zoo models` lists ours)")
    known = list(get_arch_pretrained_cfgs(arch))
    if tag and model_name not in known:
        raise UserError(f"model_name: timm knows no weights {model_name!r}, only {', '.join(known) or 'none'}")


def create_model(
    model_name: str,
    num_classes: int,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
) -> nn.Module:
    """``timm.create_model``, with a suggestion for a misspelt name and weights from a local file.

    Raises:
        UserError: There is no such model, or its weights cannot be had.
    """
    check_model_name(model_name)
    model_args = dict(model_args or {})
    if checkpoint is not None:
        read_checkpoint(checkpoint)
        # timm's own loading path, so that the family's filter for the authors' files applies.
        overlay = model_args.pop("pretrained_cfg_overlay", None) or {}
        model_args["pretrained_cfg_overlay"] = {**overlay, "file": str(checkpoint)}
    with_weights = pretrained or checkpoint is not None
    try:
        return timm.create_model(model_name, with_weights, num_classes=num_classes, **model_args)
    except (OSError, RuntimeError, ValueError) as error:  # there are none, no network, or not of this model
        if with_weights or ":" in model_name:
            raise UserError(str(error)) from error
        raise
