"""How far exported files are from the model, per family and format: the table of docs/export.md.

    python scripts/check_export.py [FAMILY...]

The smallest member of every family, with random weights and as few blocks as have each kind that it has, is exported
at 64 x 64 pixels, for that size and, separately, for any. Results are kept in scripts/results/export.json, from which
the table is made anew; the named families, by default all, are measured again.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

import zoo  # noqa: F401  (registers our models)
from zoo.errors import UserError
from zoo.export import TOLERANCE, export

FAMILIES = {
    "nat": ("nat_mini", dict(depths=(1, 1), num_heads=(2, 4))),
    "dinat": ("dinat_mini", dict(depths=(2, 1), num_heads=(2, 4), dilations=((1, 8), (1,)))),
    "dinat_s": ("dinat_s_tiny", dict(depths=(2, 1), num_heads=(3, 6), dilations=((1, 8), (1,)))),
    "nat_isotropic": ("nat_isotropic_small", dict(depth=1)),
    "gc_vit": ("gc_vit_xxtiny", dict(depths=(2, 1), num_heads=(2, 4), window_ratio=(32, 32))),
    "biformer": ("biformer_tiny", dict(depths=(1, 1, 1, 1))),
    "agent_deit": ("agent_deit_tiny", dict(depth=2, agent_depth=1)),
    "agent_pvt": ("agent_pvt_tiny", dict(depths=(1, 1, 1, 1))),
    "agent_swin": ("agent_swin_tiny", dict(depths=(1, 1, 1, 2))),
    "agent_cswin": ("agent_cswin_tiny", dict(depths=(1, 1, 1, 1))),
    "halonet": ("halonet_h0_256", dict(depths=(1, 1), num_heads=(4, 8))),
}
FORMATS = ("onnx", "torch-export", "torchscript")
SIZES = {"one size": False, "any size": True}

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "export.json"
PAGE = ROOT / "docs" / "export.md"
START, END = "<!-- table: scripts/check_export.py -->\n", "<!-- end of table -->"


def measure(family: str, format: str, any_size: bool) -> float | str:
    """The largest difference as a fraction of the largest logit, or why there is no file."""
    name, kwargs = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with TemporaryDirectory() as folder:
        try:
            return export(name, model, format, Path(folder) / "model", 64, any_size).difference
        except UserError as error:
            return str(error)


def table(results: dict[str, dict[str, float | str]]) -> str:
    """Markdown."""
    columns = [f"{format}, {size}" for format in FORMATS for size in SIZES]
    lines = ["| family (model) | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for family, (name, _) in FAMILIES.items():
        cells = [results.get(family, {}).get(column, "not measured") for column in columns]
        cells = [f"{cell:.0e}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"| {family} (`{name}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    for family in parser.parse_args().families or FAMILIES:
        for format in FORMATS:
            for size, any_size in SIZES.items():
                difference = measure(family, format, any_size)
                print(f"{family}, {format}, {size}: {difference}", flush=True)
                results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
                results.setdefault(family, {})[f"{format}, {size}"] = difference
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    if PAGE.is_file():
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + table(results) + END + rest.partition(END)[2])
    print(f"torch {torch.__version__}; files may differ by {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
