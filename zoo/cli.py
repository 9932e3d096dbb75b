"""The command ``zoo``. Heavy imports wait until a command needs them."""

import signal
import sys
import textwrap
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager

from zoo import __version__
from zoo.errors import UserError
from zoo.recipes import list_recipes

HELP = """\
usage: zoo <command> [options]

Vision backbones and diffusion models on one layer of 2-D attention kernels.

train and evaluate (Lightning's command line: `zoo fit --help` lists its options)
  fit        train a model                    zoo fit --config digits/dinat
  validate   measure on the validation data   zoo validate --config digits/dinat --ckpt_path x.ckpt
  test       measure on the test data         zoo test --config digits/dinat --ckpt_path x.ckpt
  predict    write each image's class         zoo predict photos --checkpoint x.ckpt
  sample     draw images from a trained flow  zoo sample runs/digits-flow/version_0
  export     write a model for other programs  zoo export x.ckpt --format onnx --output x.onnx
  eval-diffusion  compare image folders       zoo eval-diffusion made/ real/ --model inception_v3

look around
  explain    draw where a model looks         zoo explain photo.jpg --model dinat_tiny
  bench      time models and kernels here     zoo bench dinat_tiny swin_tiny_patch4_window7_224
  models     list our models                  zoo models 'dinat_*'
  demo       train on digits, draw pictures   zoo demo
  doctor     which kernels run here, and why  zoo doctor

recipes, for --config (or the path of a YAML file of your own; later options win)
{recipes}

  -h, --help     show this text
  --version      show the version"""


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        with ended_by_sigterm(command != "fit"):
            run(command, rest)
    except UserError as error:
        # What a loader's worker raised comes with a stack trace before it.
        message = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].rstrip()
        print(f"zoo: error: {message}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning makes the former the latter, with status 1.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print("zoo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT  # as a shell reports it
    return 0


@contextmanager
def ended_by_sigterm(wanted: bool) -> Iterator[None]:
    """Let SIGTERM end the command, and what it has begun be tidied up.

    Lightning's trainer puts a handler of its own in the place of none, to which only training listens.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(command: str, args: list[str]) -> None:
    """Run one command; mistakes of the user's are raised as :class:`UserError`."""
    if command in ("-h", "--help", "help"):
        recipes = "  ".join(list_recipes())
        print(HELP.format(recipes=textwrap.fill(recipes, 100, initial_indent="  ", subsequent_indent="  ")))
    elif command == "--version":
        print(f"zoo {__version__}")
    elif command == "predict" and args and not args[0].startswith("-"):
        parser = ArgumentParser("zoo predict", description="Write the likeliest class of every image into a file.")
        parser.add_argument("images", nargs="+", help="image files, and folders with all that is below them")
        parser.add_argument("--model", metavar="NAME", help="any model of timm's or ours; a checkpoint knows its own")
        parser.add_argument("--checkpoint", metavar="FILE", help="of `zoo fit`, or a file of weights of --model")
        parser.add_argument("--pretrained", action="store_true", help="download the published weights")
        parser.add_argument("--output", default="predictions.csv", metavar="FILE", help="(default: predictions.csv)")
        parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: 32)")
        parser.add_argument("--num-workers", type=int, help="processes that load (default: one per core, at most 8)")
        options = parser.parse_args(args)
        from zoo.predict import run_predict

        run_predict(**vars(options))
    elif command in ("fit", "validate", "test", "predict"):
        from zoo.lightning_cli import RecipeCLI

        RecipeCLI([command, *args])
    elif command == "sample":
        parser = ArgumentParser(
            "zoo sample", description="Draw images of chosen classes from a flow that `zoo fit` trained."
        )
        parser.add_argument("source", help="a pipeline folder, or the folder or a checkpoint of such a run")
        parser.add_argument("--classes", type=int, nargs="+", metavar="CLASS", help="such as 3 7 (default: all)")
        parser.add_argument("--grid", type=int, default=8, metavar="ROWS", help="samples of each class (default: 8)")
        parser.add_argument("--steps", type=int, default=20, help="steps from noise to image (default: 20)")
        parser.add_argument(
            "--guidance", type=float, default=1.0, help="1 for none; more is clearer and less varied (default: 1)"
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
        parser.add_argument("--scale", type=int, default=8, help="draw each pixel this many times (default: 8)")
        parser.add_argument("--output", default="samples.png", metavar="PNG", help="(default: samples.png)")
        options = parser.parse_args(args)
        from zoo.sample import run_sample

        run_sample(**vars(options))
    elif command == "explain":
        parser = ArgumentParser(
            "zoo explain", description="Draw a classifier's answers, where it looks (Grad-CAM), and its attention."
        )
        parser.add_argument("image", help="an image file")
        parser.add_argument("--model", metavar="NAME", help="any model of timm's or ours; a checkpoint knows its own")
        parser.add_argument("--checkpoint", metavar="FILE", help="of `zoo fit`, or a file of weights of --model")
        parser.add_argument("--pretrained", action="store_true", help="download the published weights")
        parser.add_argument("--output", default="explanation.png", metavar="PNG", help="(default: explanation.png)")
        options = parser.parse_args(args)
        from zoo.explain import run_explain

        run_explain(**vars(options))
    elif command == "bench":
        parser = ArgumentParser(
            "zoo bench", description="Measure models of ours or timm's, or our operators, once their results are right."
        )
        parser.add_argument("models", nargs="*", metavar="MODEL", help="such as dinat_tiny convnext_tiny")
        parser.add_argument("--kernels", action="store_true", help="measure neighborhood attention and its peers")
        parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")
        parser.add_argument("--batch-size", type=int, default=1, help="for throughput and memory (default: 1)")
        parser.add_argument("--image-size", type=int, help="side in pixels (default: each model's own)")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
        parser.add_argument(
            "--compile",
            nargs="?",
            const="default",
            choices=("default", "reduce-overhead", "max-autotune"),
            help="run models through torch.compile, in one of its modes",
        )
        parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure (default: 2)")
        parser.add_argument("--output", metavar="DIR", help="write the figures as CSV and a plot into this folder")
        options = vars(parser.parse_args(args))
        from zoo.bench import Settings, run_bench

        run_bench(options.pop("models"), options.pop("kernels"), options.pop("output"), Settings(**options))
    elif command == "eval-diffusion":
        parser = ArgumentParser(
            "zoo eval-diffusion", description="Measure how far generated images are from real ones."
        )
        parser.add_argument("generated", help="a folder of images, or a pipeline or run as `zoo sample` takes it")
        parser.add_argument("real", help="a folder of images")
        parser.add_argument("--model", metavar="NAME", help="whose features are compared: any of timm's or ours")
        parser.add_argument("--checkpoint", metavar="FILE", help="of `zoo fit`, or a file of weights of --model")
        parser.add_argument("--pretrained", action="store_true", help="download the published weights")
        parser.add_argument("--samples", type=int, default=1000, help="drawn from a pipeline (default: 1000)")
        parser.add_argument("--steps", type=int, default=20, help="steps from noise to image (default: 20)")
        parser.add_argument("--guidance", type=float, default=1.0, help="of a pipeline, 1 for none (default: 1)")
        parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
        parser.add_argument("--seed", type=int, default=0, help="of the samples and the subsets (default: 0)")
        parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")
        options = parser.parse_args(args)
        from zoo.eval_diffusion import run_eval_diffusion

        run_eval_diffusion(**vars(options))
    elif command == "export":
        parser = ArgumentParser(
            "zoo export", description="Write a model as a file for other programs, checked against the model."
        )
        parser.add_argument("source", metavar="MODEL|CHECKPOINT", help="a model's name or a checkpoint of `zoo fit`")
        parser.add_argument("--format", required=True, choices=("onnx", "torch-export", "torchscript"))
        parser.add_argument("--output", required=True, metavar="FILE")
        parser.add_argument("--image-size", type=int, metavar="N", help="side of the images (default: the model's)")
        parser.add_argument("--dynamic-size", action="store_true", help="images may have other heights and widths too")
        parser.add_argument("--pretrained", action="store_true", help="the published weights of a named model")
        parser.add_argument("--weights", metavar="FILE", help="a file of weights for a named model")
        options = parser.parse_args(args)
        from zoo.export import run_export

        run_export(**vars(options))
    elif command == "models":
        parser = ArgumentParser("zoo models", description="List our models, with their published ImageNet-1k top-1.")
        parser.add_argument("pattern", nargs="?", default="*", help="such as 'dinat_*', quoted, or any part of a name")
        options = parser.parse_args(args)
        from zoo.models import print_models

        print_models(options.pattern)
    elif command == "demo":
        parser = ArgumentParser(
            "zoo demo", description="Train a small DiNAT and a small flow on digits, then draw what they learned."
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of the training runs (default: 0)")
        options = parser.parse_args(args)
        from zoo.demo import run_demo

        run_demo(options.seed)
    elif command == "doctor":
        parser = ArgumentParser(
            "zoo doctor", description="Say what is installed, and which backend calls would use here and why."
        )
        sizes = ("BATCH", "HEIGHT", "WIDTH", "HEADS", "DIM")
        parser.add_argument("--shape", type=int, nargs=5, metavar=sizes, help="ask about one call: its query's shape")
        parser.add_argument("--kernel-size", type=int, default=7, help="its window (default: 7)")
        parser.add_argument("--dilation", type=int, default=1, help="its dilation (default: 1)")
        parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
        parser.add_argument("--device", default="cpu", help="such as cuda, which need not be there (default: cpu)")
        options = parser.parse_args(args)
        from zoo.doctor import run_doctor

        run_doctor(**vars(options))
    else:
        raise UserError(f"there is no command {command!r}; `zoo --help` lists them")
