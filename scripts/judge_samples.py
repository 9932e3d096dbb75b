"""Judge a flow's samples of digits by a separately trained classifier.

$ zoo fit --config digits/flow
$ zoo fit --config digits/dinat
$ python scripts/judge_samples.py runs/digits-flow/version_0 runs/digits-dinat/version_0/checkpoints/last.ckpt
"""

from argparse import ArgumentParser

from rich.console import Console

from zoo.judge import judge_digits
from zoo.sample import load_pipeline
from zoo.task import Classification


def main() -> None:
    parser = ArgumentParser(description="Judge a flow's samples of digits by a separately trained classifier.")
    parser.add_argument("flow", help="a pipeline folder, or a run's folder or checkpoint")
    parser.add_argument("classifier", help="a checkpoint of `zoo fit --config digits/dinat`")
    parser.add_argument("--steps", type=int, default=20, help="steps from noise to image (default: 20)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5], help="scales (default: 1 and 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    options = parser.parse_args()
    pipeline = load_pipeline(options.flow)
    classifier = Classification.load_from_checkpoint(options.classifier, weights_only=True, map_location="cpu")
    console = Console()
    for guidance in options.guidance:
        console.print(judge_digits(pipeline, classifier, options.steps, guidance, options.seed).table())


if __name__ == "__main__":
    main()
