"""Lightning's command line, as ``zoo fit``, ``validate``, ``test`` and ``predict`` run it."""

import sys
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from zoo.checkpoints import check_fits, read_lightning_checkpoint
from zoo.data import Digits, ImageFolder, ReportSkipped  # noqa: F401  (so that short class names resolve)
from zoo.errors import UserError
from zoo.evaluation import WritePredictions
from zoo.recipes import resolve_recipes
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
            trainer_defaults={"callbacks": [ReportSkipped()], "default_root_dir": "runs"},
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
        if isinstance(self.model, Classification):
            self.trainer.callbacks.append(WritePredictions())
            kwargs["return_predictions"] = False  # all probabilities of all images may not fit into memory
        self.trainer.predict(**kwargs)
