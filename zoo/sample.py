"""``zoo sample``: draw images of chosen classes from a trained flow."""

import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from torchvision.utils import save_image

from zoo.checkpoints import check_fits, read_checkpoint, read_lightning_checkpoint
from zoo.diffusion import FlowPipeline, NeighborhoodDenoiser
from zoo.errors import UserError, expect_at_least
from zoo.files import check_output, write_whole
from zoo.flow import RectifiedFlow


def run_sample(
    source: str,
    classes: Sequence[int] | None,
    grid: int,
    steps: int,
    guidance: float,
    seed: int,
    scale: int,
    output: str,
) -> None:
    """Write a grid of samples, a column per class and ``grid`` rows, and say where it is."""
    expect_at_least(1, **{"--grid": grid, "--steps": steps, "--scale": scale})
    if Path(output).suffix.lower() != ".png":
        raise UserError(f"--output: expected a file name that ends in .png, got {output}")
    check_output(output)
    pipeline = load_pipeline(source)
    known = pipeline.denoiser.config.num_classes
    classes = list(range(known)) if classes is None else list(classes)
    unknown = [label for label in classes if not 0 <= label < known]
    if unknown:
        raise UserError(f"--classes: expected 0 to {known - 1}, got {' '.join(map(str, unknown))}")

    images = sample(pipeline, classes * grid, steps, guidance, seed)
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    with write_whole(output, binary=True) as file:
        save_image(images, file, format="png", nrow=len(classes), pad_value=0.5)
    print(f"{len(images)} samples, {steps} steps, guidance {guidance:g}, seed {seed}: {output}")


def sample(
    pipeline: FlowPipeline, labels: Sequence[int], steps: int, guidance: float, seed: int, batch_size: int = 256
) -> torch.Tensor:
    """Return a sample of each label, [samples, channels, height, width], 0 to 1, from noise drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(labels[i : i + batch_size], steps, guidance, generator, output_type="pt").images.cpu()
        for i in range(0, len(labels), batch_size)
    ]
    return torch.cat(batches)


def load_pipeline(source: str | Path) -> FlowPipeline:
    """Load a trained flow onto the CPU, running no code that its files may hold.

    Args:
        source: A pipeline folder, the folder of a run of ``zoo fit`` that has one, or a checkpoint of the run.

    Raises:
        UserError: It is none of these, or damaged.
    """
    path = Path(source)
    if path.is_file():
        return _pipeline_from_checkpoint(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a pipeline folder or a checkpoint of `zoo fit`")
    folder = path / "pipeline" if (path / "pipeline").is_dir() else path
    # DiffusionPipeline.from_pretrained would run Python files that lie beside the weights.
    denoiser, scheduler = folder / "denoiser", folder / "scheduler"
    try:
        index = json.loads((folder / "model_index.json").read_text())
        kind, scheduler_name = index["_class_name"], index["scheduler"][1]
        if kind != FlowPipeline.__name__:
            raise UserError(f"{folder} holds a {kind}, expected a {FlowPipeline.__name__}")
        scheduler_class = getattr(diffusers, scheduler_name)
        read_checkpoint(denoiser / "diffusion_pytorch_model.safetensors")
        model = NeighborhoodDenoiser.from_pretrained(denoiser, use_safetensors=True, low_cpu_mem_usage=False)
        pipeline = FlowPipeline(model, scheduler_class.from_pretrained(scheduler, local_files_only=True))
    except UserError:
        raise
    except Exception as error:  # missing or damaged files, in many forms
        raise UserError(f"{folder} is not a pipeline folder of `zoo fit`: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_from_checkpoint(path: Path) -> FlowPipeline:
    checkpoint = read_lightning_checkpoint(path)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    if "denoiser" not in hyper_parameters:
        held = hyper_parameters.get("model_name", "something else")
        raise UserError(f"{path} holds a {held}, expected a checkpoint of zoo.flow.RectifiedFlow")
    names = ("num_classes", "denoiser")
    task = RectifiedFlow(**{name: hyper_parameters[name] for name in names})
    check_fits(checkpoint, task, path)
    task.load_state_dict(checkpoint["state_dict"])
    return task.eval().pipeline()
