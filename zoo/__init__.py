"""Vision backbones and diffusion models on one layer of 2-D attention kernels.

Importing ``zoo`` registers every backbone with timm; ``timm.create_model("dinat_tiny")`` works from then on.
``zoo.accelerate(model)`` switches the attention of timm's own HaloNets and GC ViTs to our kernels.
"""

from pathlib import Path

# In a clone the subpackages are this folder's siblings (kernels/, backbones/, ...), not its children.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "kernels" / "neighborhood").is_dir():
    __path__.append(str(_clone))

from zoo import backbones  # noqa: E402  (needs the path above)
from zoo.accelerate import accelerate, restore  # noqa: E402

__all__ = ["accelerate", "backbones", "restore"]
__version__ = "0.1.0.dev0"
