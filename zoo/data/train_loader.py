"""A training loader whose images do not depend on how often the run was interrupted, nor on the number of workers."""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from zoo.errors import UserError


class TrainLoader(DataLoader):
    """Shuffles, gives each process its share, and can begin in the middle of an epoch.

    The order is a function of the seed and the epoch. What augmentation draws for an image is a function of the seed,
    the epoch and the image's index, whichever process loads it: Python's, NumPy's and PyTorch's generators are seeded
    so before ``dataset[index]`` is called, and put back after each batch. The first ``n`` images of the order are the
    same for any number of processes, so that a step sees the same images wherever the global batch is the same.

    ``state_dict`` and ``load_state_dict`` hold the position; Lightning's fit loop keeps them in its checkpoints.

    Args:
        dataset: A dataset with a length.
        batch_size: Images per batch and process.
        sampler: Another order, without the seeding; by default :class:`ShuffledSampler`.
        **kwargs: For ``torch.utils.data.DataLoader``.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 1, sampler: Sampler | None = None, **kwargs: Any) -> None:
        sampler = ShuffledSampler(dataset) if sampler is None else sampler
        # With its own generator, starting an epoch takes nothing from the one that the model draws from.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(SeededSamples(dataset), batch_size, sampler=sampler, **kwargs)
        self.start = 0  # batches of the next epoch to leave out
        self.given = 0  # batches of this epoch that are done

    def __iter__(self) -> Iterator[Any]:
        # A generator: workers fetch nothing before the first batch is asked for, when epoch and position are known.
        self.given, self.start = self.start, 0
        if isinstance(self.sampler, ShuffledSampler):
            self.sampler.start = self.given * self.batch_size
        batches, end = super().__iter__(), object()
        while True:
            with isolate_rng(include_cuda=False):  # without workers, images are drawn in this process
                batch = next(batches, end)
            if batch is end:
                return
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch the loader is, and what that position depends on."""
        return {"batches": self.given % max(1, len(self)), **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch at this position.

        Raises:
            UserError: The position is within an epoch of another order.
        """
        differs = [f"{k} was {state.get(k)} and is {v}" for k, v in self._order().items() if state.get(k) != v]
        if differs and state["batches"]:
            raise UserError(
                f"the checkpoint was saved {state['batches']} batches into an epoch, where {'; '.join(differs)}: go on "
                "with the same, or from a checkpoint of an epoch's end"
            )
        self.start = state["batches"]

    def _order(self) -> dict[str, int]:
        order = {"images": len(self.dataset), "batch_size": self.batch_size}
        if isinstance(self.sampler, ShuffledSampler):
            order |= {"processes": self.sampler.num_replicas, "seed": self.sampler.seed}
        return order

    def indices(self, batch: int) -> list[int]:
        """The dataset's indices of the images in batch number ``batch`` of this epoch."""
        keys = self.sampler.order() if isinstance(self.sampler, ShuffledSampler) else list(self.sampler)
        return keys[batch * self.batch_size : (batch + 1) * self.batch_size]


class ShuffledSampler(DistributedSampler):
    """torch's sampler for one or several processes, which can leave out the beginning of an epoch.

    Lightning sets the epoch. It gives each index as ``(index, epoch, seed)``, for :class:`SeededSamples`.
    """

    def __init__(self, dataset: Dataset) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # what --seed_everything is
        )
        self.start = 0

    def order(self) -> list[int]:
        """All of this process's indices in this epoch."""
        return list(super().__iter__())

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        start, self.start = self.start, 0
        return ((index, self.epoch, self.seed) for index in self.order()[start:])


class SeededSamples(Dataset):
    """Another dataset, each sample drawn with generators that are seeded by its index, the epoch and the seed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int, int]) -> Any:
        if not isinstance(key, tuple):  # Lightning's overfit_batches brings its own sampler
            return self.dataset[key]
        seeds = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])  # noqa: NPY002  (the generator that augmentations draw from)
        torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed CUDA's as well
        return self.dataset[key[0]]
