"""Latents and prompt embeddings for distilling diffusion models: read from files, or drawn by the teacher."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.train_loader import TrainLoader
from zoo.errors import UserError, expect_at_least

KEYS = ("latents", "prompt_embeds", "pooled_prompt_embeds")


class CachedLatents(LightningDataModule):
    """A folder of safetensors files, one per image.

    Each holds ``latents`` [channels, height, width], scaled and shifted as the transformer takes them,
    ``prompt_embeds`` [tokens, channels] and ``pooled_prompt_embeds`` [channels]; all files have the same sizes.

    Args:
        root: The folder; files are found in its subfolders too.
        batch_size: Images per batch.
        num_workers: Processes that read files.
    """

    def __init__(self, root: str, batch_size: int = 2, num_workers: int = 4) -> None:
        super().__init__()
        expect_at_least(1, batch_size=batch_size)
        expect_at_least(0, num_workers=num_workers)
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        self.files = sorted(self.root.rglob("*.safetensors"))
        if not self.files:
            raise UserError(f"root: no .safetensors files in {self.root}")

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(LatentFiles(self.files), self.batch_size, drop_last=True, num_workers=self.num_workers)


class LatentFiles(Dataset):
    """Dictionaries of the tensors in ``files``."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        path = self.files[item]
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"cannot read {path}: {error}") from None
        missing = [key for key in KEYS if key not in tensors]
        if missing:
            raise UserError(f"{path} has no {', '.join(missing)}")
        return {key: tensors[key] for key in KEYS}


class TeacherLatents(LightningDataModule):
    """Latents that the teacher draws before training, for random prompt embeddings: no files and no network.

    Args:
        height: Height of the latents, even.
        width: Width of the latents, even.
        count: How many to draw.
        text_tokens: Length of the prompts.
        steps: Steps of the teacher's sampler.
        batch_size: Images per batch.
        seed: Of the prompts and the noise.
    """

    def __init__(
        self,
        height: int = 16,
        width: int = 16,
        count: int = 64,
        text_tokens: int = 8,
        steps: int = 8,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("height", height), ("width", width)):
            if value < 2 or value % 2:
                raise UserError(f"{name}: latents are packed 2 x 2, so it must be even, got {value}")
        if count < batch_size:
            raise UserError(f"count: {count} latents do not fill a batch of {batch_size}")
        self.height, self.width, self.count, self.text_tokens = height, width, count, text_tokens
        self.steps, self.batch_size, self.seed = steps, batch_size, seed

    def setup(self, stage: str) -> None:
        task = self.trainer.lightning_module
        config = task.transformer.config
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {
            "latents": (config.in_channels // 4, self.height, self.width),
            "prompt_embeds": (self.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        drawn = {key: torch.randn(self.count, *shape, generator=generator) for key, shape in shapes.items()}
        batches = zip(*(x.split(self.batch_size) for x in drawn.values()))
        drawn["latents"] = torch.cat([task.draw(*batch, steps=self.steps) for batch in batches])
        self.samples = [dict(zip(drawn, values)) for values in zip(*drawn.values())]

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.samples, self.batch_size, drop_last=True)
