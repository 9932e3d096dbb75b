"""Vision backbones and diffusion models on one layer of 2-D attention kernels.

Importing ``zoo`` registers every backbone with timm; ``timm.create_model("dinat_tiny")`` works from then on.
"""

from pathlib import Path

# In a clone the subpackages are this folder's siblings (kernels/, backbones/, ...), not its children.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "kernels" / "neighborhood").is_dir():
    __path__.append(str(_clone))

from zoo import backbones  # noqa: E402  (needs the path above)

__all__ = ["backbones"]
__version__ = "0.1.0.dev0"
