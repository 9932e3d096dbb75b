"""The packaged recipes: Lightning CLI configurations that are found by name."""

from importlib import resources
from pathlib import Path

from zoo.errors import UserError


def list_recipes() -> list[str]:
    """Return the names of the packaged recipes, such as ``digits/dinat``."""
    root = Path(str(resources.files("zoo.configs")))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def resolve_recipe(name: str) -> str:
    """Return the path of a recipe: a file that exists, or else the packaged recipe of that name."""
    if Path(name).is_file() or "://" in name:
        return name
    recipe = name.removesuffix(".yaml")
    if recipe not in list_recipes():
        raise UserError(f"--config: {name!r} is neither a file nor a recipe; recipes: {', '.join(list_recipes())}")
    return str(resources.files("zoo.configs").joinpath(f"{recipe}.yaml"))


def resolve_recipes(args: list[str]) -> list[str]:
    """Replace what follows each ``--config`` with the recipe's path."""
    args = list(args)
    for i, arg in enumerate(args):
        if arg in ("--config", "-c") and i + 1 < len(args):
            args[i + 1] = resolve_recipe(args[i + 1])
        elif arg.startswith("--config="):
            args[i] = "--config=" + resolve_recipe(arg.removeprefix("--config="))
    return args
