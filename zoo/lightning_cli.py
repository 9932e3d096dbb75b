"""Lightning's command line, as ``zoo fit``, ``validate``, ``test`` and ``predict`` run it."""

import sys
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from zoo.checkpoints import check_fits, is_sharded, read_lightning_checkpoint
from zoo.data import Digits, ImageFolder, ReportSkipped  # noqa: F401  (so that short class names resolve)
from zoo.errors import UserError
from zoo.evaluation import WritePredictions
from zoo.recipes import resolve_recipes
from zoo.report import Report
from zoo.task import Classification, expect_data
from zoo.training import SIGTERM_STATUS, GlobalBatchSize, SaveProgress, SkipNonFinite, find_last_checkpoint


class RecipeTrainer(Trainer):
    """Lightning's trainer. On the command line and in recipes, a limit of ``1`` is one batch, of ``1.0`` all of them.

    Lightning says ``Optional[Union[int, float]]``, for which Python's ``typing`` may give what it was asked for before,
    in the other order: then ``1`` is read as a float, and limits nothing.

    Args:
        limit_train_batches: Batches of an epoch to train on: a number (1), or a share of them (0.1; 1.0 for all).
        limit_val_batches: The same for validation.
        limit_test_batches: The same for testing.
        limit_predict_batches: The same for prediction.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )


class RecipeCLI(LightningCLI):
    """Lightning's command line, with recipes by name, linked numbers of classes, and checkpoints checked first."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=RecipeTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [ReportSkipped(), Report(args)],
                "default_root_dir": "runs",
                "plugins": [{"class_path": "zoo.training.AtomicCheckpointIO"}],
            },
            parser_kwargs={"prog": "zoo"},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--base", type=str | None, help="in a recipe: the recipe that it builds on")
        parser.set_defaults({"model": {"class_path": "zoo.task.Classification"}})
        parser.add_lightning_class_args(SaveProgress, "save_progress")
        parser.add_lightning_class_args(SkipNonFinite, "non_finite")
        parser.add_argument(
            "--global_batch_size",
            type=int | None,
            default=None,
            help="Images per optimizer step: as many batches are accumulated as the number of devices leaves to do.",
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        args = sys.argv[1:] if args is None else args
        self.config = parser.parse_args(resolve_recipes(args))
        seed = self.config[self.config.subcommand].seed_everything
        if seed is not None and not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything: expected 0 to {2**32 - 1}, got {seed}")
        self.config[self.config.subcommand].base = None  # the run's config.yaml holds all that it built on
        self.checkpoint = None
        path = self.config[self.config.subcommand].get("ckpt_path")
        # "best", "last" and "hpc" are Lightning's keywords; addresses such as s3:// are Lightning's to open.
        if path and path not in ("best", "last", "hpc") and "://" not in path and not is_sharded(path):
            self.checkpoint = read_lightning_checkpoint(path)
            model = self.config[self.config.subcommand].model.get("init_args", {})
            asked = model.get("model_name")
            held = self.checkpoint.get("hyper_parameters", {}).get("model_name")
            if asked and held and asked != held:  # Lightning would quietly run the checkpoint's model instead
                raise UserError(f"{path} holds a {held}, but the configuration asks for {asked}")
            for name, none in (("pretrained", False), ("checkpoint", None)):
                if name in model:  # the checkpoint has all weights: no others are needed, or fetched
                    model[name] = none

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
        except (ValueError, TypeError, MisconfigurationException) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # jsonargparse wraps what a constructor raised in a report on types
                cause = cause.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(str(cause).strip() or type(cause).__name__) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        if config.trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("save_progress")
        if config.global_batch_size is not None:
            self.trainer_defaults["callbacks"].append(GlobalBatchSize(config.global_batch_size))
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") == "last":  # Lightning would look in the folder of the new run only
            path = find_last_checkpoint(self.trainer, needed=self.subcommand != "fit")
            config["ckpt_path"] = path and str(path)
            self.checkpoint = read_lightning_checkpoint(path) if path and path.is_file() else None
        path = config.get("ckpt_path")
        if path and is_sharded(path) and not self.trainer.strategy.restore_checkpoint_after_setup:
            read_lightning_checkpoint(path)  # says what shards need
        if self.checkpoint is not None and self.model.strict_loading:
            check_fits(self.checkpoint, self.model, config["ckpt_path"])
        if self.checkpoint is not None and self.subcommand != "fit" and isinstance(self.model, Classification):
            expect_data(self.model.model, self.checkpoint)  # now, because the data ask the model
        self.checkpoint = None

    def fit(self, **kwargs: Any) -> None:
        """Train; SIGTERM ends the process with status 143, after a checkpoint was saved."""
        try:
            self.trainer.fit(**kwargs)
        except SIGTERMException:
            # The first process ends the others, and would itself be ended if one of them reported a failure.
            raise SystemExit(SIGTERM_STATUS if self.trainer.is_global_zero else 0) from None

    def predict(self, **kwargs: Any) -> None:
        """Run prediction and write ``predictions.csv`` into the run's folder."""
        if isinstance(self.model, Classification):
            self.trainer.callbacks.append(WritePredictions())
            kwargs["return_predictions"] = False  # all probabilities of all images may not fit into memory
        self.trainer.predict(**kwargs)
