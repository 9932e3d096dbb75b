"""Classification with weights, gradients and optimizer states spread over the devices (FSDP2)."""

from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from zoo.errors import UserError
from zoo.task import Classification

LEAST = 2**20  # parameters that are worth gathering by themselves


class ShardedClassification(Classification):
    """:class:`~zoo.task.Classification` for Lightning's ``ModelParallelStrategy``, which shards as it is told here.

    Each block, that is each member of a list of modules, gathers its weights when it is called, with those of small
    blocks in it. Other strategies can evaluate what was trained so, without shards.
    """

    def configure_model(self) -> None:
        if self.device_mesh is None:
            if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
                raise UserError(
                    "zoo.sharded.ShardedClassification is trained with the strategy ModelParallelStrategy only; "
                    "without it, train zoo.task.Classification"
                )
            return
        mesh = self.device_mesh["data_parallel"]
        lists = [module for module in self.model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
        # From the inside out, as fully_shard asks; modules() goes from the outside in.
        for block in [child for modules in reversed(lists) for child in modules]:
            if sum(x.numel() for x in block.parameters() if not isinstance(x, DTensor)) >= LEAST:
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
