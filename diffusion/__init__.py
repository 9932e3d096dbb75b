"""Attention processors and denoisers for diffusers.

    from zoo.diffusion import ClearAttnProcessor, attach

    with attach(pipeline, ClearAttnProcessor(radius=16)):
        image = pipeline(prompt, height=2048, width=2048).images[0]

`attach` takes a pipeline or its transformer or UNet and gives back a handle, whose `detach()` (or the end of the `with`
block) restores the model. Layers are chosen by name, `attach(unet, NeighborhoodAttnProcessor(13),
layers=["down_blocks.0", "up_blocks.3"])`. Processors also go into `model.set_attn_processor(processor)`, where maps are
square or the processor is given `grid=(height, width)`.

`AgentAttnProcessor` is for UNets, and follows the steps of the sampler by itself: `attach(pipeline,
AgentAttnProcessor())` for Stable Diffusion 1 and 2, `AgentAttnProcessor(max_downsample=2)` for SDXL.
"""

from zoo.diffusion.agent import AgentAttnProcessor, AgentPhase
from zoo.diffusion.attach import Attachment, attach
from zoo.diffusion.clear import ClearAttnProcessor, clear_parameters, load_clear_weights, save_clear_weights
from zoo.diffusion.denoiser import NeighborhoodDenoiser
from zoo.diffusion.entropy import EntropyScaledAttnProcessor
from zoo.diffusion.grid import Grid
from zoo.diffusion.neighborhood import NeighborhoodAttnProcessor
from zoo.diffusion.pipeline import FlowPipeline
from zoo.diffusion.processor import GridAttnProcessor

__all__ = [
    "AgentAttnProcessor",
    "AgentPhase",
    "Attachment",
    "ClearAttnProcessor",
    "EntropyScaledAttnProcessor",
    "FlowPipeline",
    "Grid",
    "GridAttnProcessor",
    "NeighborhoodAttnProcessor",
    "NeighborhoodDenoiser",
    "attach",
    "clear_parameters",
    "load_clear_weights",
    "save_clear_weights",
]
