"""The packaged recipes: Lightning CLI configurations that are found by name."""

from importlib import resources
from pathlib import Path

import yaml

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


def resolve_lineage(name: str) -> list[str]:
    """Return the path of a recipe after those of the recipes that it builds on, which its key ``base`` names."""
    paths = [resolve_recipe(name)]
    while (base := _read_base(paths[0])) is not None:
        path = resolve_recipe(base)
        if path in paths:
            raise UserError(f"--config: {name!r} builds on itself: {' on '.join([*reversed(paths), path])}")
        paths.insert(0, path)
    return paths


def _read_base(path: str) -> str | None:
    if not Path(path).is_file():  # an address: Lightning fetches it
        return None
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):  # the parser of the command line will say what is wrong
        return None
    return recipe.get("base") if isinstance(recipe, dict) else None


def resolve_recipes(args: list[str]) -> list[str]:
    """Replace what follows each ``--config`` with the recipe's path, and put before it what it builds on."""
    resolved = []
    rest = iter(args)
    for arg in rest:
        option, equals, name = arg.partition("=")
        if option in ("--config", "-c") and (equals or (name := next(rest, ""))):
            for path in resolve_lineage(name):
                resolved += ["--config", path]
        else:
            resolved.append(arg)
    return resolved
