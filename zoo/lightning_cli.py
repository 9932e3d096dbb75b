"""Lightning's command line, as ``zoo fit``, ``validate``, ``test`` and ``predict`` run it."""

import csv
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from zoo.checkpoints import check_fits, read_lightning_checkpoint
from zoo.data import Digits, ImageFolder, ReportSkipped  # noqa: F401  (so that short class names resolve)
from zoo.errors import UserError
from zoo.recipes import resolve_recipes
from zoo.report import Report
from zoo.task import Classification


class RecipeCLI(LightningCLI):
    """Lightning's command line, with recipes by name, linked numbers of classes, and checkpoints checked first."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"callbacks": [ReportSkipped(), Report(args)], "default_root_dir": "runs"},
            parser_kwargs={"prog": "zoo"},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "zoo.task.Classification"}})
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        args = sys.argv[1:] if args is None else args
        self.config = parser.parse_args(resolve_recipes(args))
        self.checkpoint = None
        path = self.config[self.config.subcommand].get("ckpt_path")
        # "best", "last" and "hpc" are Lightning's keywords; addresses such as s3:// are Lightning's to open.
        if path and path not in ("best", "last", "hpc") and "://" not in path:
            self.checkpoint = read_lightning_checkpoint(path)
            asked = self.config[self.config.subcommand].model.get("init_args", {}).get("model_name")
            held = self.checkpoint.get("hyper_parameters", {}).get("model_name")
            if asked and held and asked != held:  # Lightning would quietly run the checkpoint's model instead
                raise UserError(f"{path} holds a {held}, but the configuration asks for {asked}")

    def before_instantiate_classes(self) -> None:
        # Checkpoints are never unpickled beyond tensors and plain values.
        self.config[self.subcommand]["weights_only"] = True
        trainer = self.config[self.subcommand].trainer
        if self.subcommand == "fit" and trainer.logger in (None, True):
            trainer.logger = [
                Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(save_dir=folder))
                for name, folder in (
                    ("CSVLogger", trainer.default_root_dir),  # the first one's folder is the run's
                    ("TensorBoardLogger", f"{trainer.default_root_dir}/tensorboard"),
                )
            ]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a constructor raised in a report on types
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def after_instantiate_classes(self) -> None:
        if self.checkpoint is not None and self.model.strict_loading:
            check_fits(self.checkpoint, self.model, self.config[self.subcommand]["ckpt_path"])
        self.checkpoint = None

    def predict(self, **kwargs: Any) -> None:
        """Run prediction and write ``predictions.csv`` into the run's folder."""
        batches = self.trainer.predict(**kwargs)
        if not isinstance(self.model, Classification) or not self.trainer.is_global_zero:
            return
        classes = getattr(self.datamodule, "classes", None)
        path = Path(self.trainer.log_dir or ".") / "predictions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "label", "class", "probability"])
            for batch in batches:
                labels, probabilities = batch["label"].tolist(), batch["probability"].tolist()
                names = batch["name"] if batch["name"] is not None else [""] * len(labels)
                for name, label, probability in zip(names, labels, probabilities, strict=True):
                    writer.writerow([name, label, classes[label] if classes else label, f"{probability:.4f}"])
        print(f"predictions: {path}")
