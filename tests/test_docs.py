"""What the pages say can be typed: commands parse, Python compiles and imports what exists, links lead somewhere."""

import argparse
import ast
import importlib
import re
import shlex
from itertools import groupby
from pathlib import Path

import pytest
import yaml

import zoo.lightning_cli
from zoo.cli import HELP, run
from zoo.lightning_cli import RecipeCLI
from zoo.recipes import list_recipes, resolve_recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Parsed(Exception):
    """Raised instead of running a command."""


def blocks(page, *languages):
    """Code blocks of a page, and on which line each begins."""
    found, start = [], None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if start is None and (match := re.match(r"\s*```(\w*)", line)):
            start, language, lines = number, match[1], []
        elif start is not None and line.strip() == "```":
            if language in languages:
                found.append((start, "\n".join(lines)))
            start = None
        elif start is not None:
            lines.append(line)
    return found


def commands(page):
    """The commands in a page's shell blocks, as lists of words."""
    for number, block in blocks(page, "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            for is_separator, command in groupby(words, key=lambda word: word in ("|", "&&", ";", ">")):
                command = [*command]
                while command and re.match(r"[A-Z_]+=", command[0]):  # a variable for this command
                    command.pop(0)
                if command and not is_separator:
                    yield number, command


@pytest.fixture(scope="module")
def lightning_parser():
    """The parser of `zoo fit` and its like, made once: it takes most of the time."""

    def keep(self, parser, args):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "parse_arguments", keep)
        with pytest.raises(Parsed) as parsed:
            RecipeCLI(["fit"])
    return parsed.value.args[0]


def parse(words, lightning_parser, monkeypatch):
    """Parse a command of `zoo` as `zoo` does; other mistakes than in its options are raised as they are to users."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    def parse_recipe(args):
        lightning_parser.parse_args(resolve_recipes(args))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(zoo.lightning_cli, "RecipeCLI", parse_recipe)
    try:
        run(words[0] if words else "--help", words[1:])
    except Parsed:
        pass


def check_script(path, options):
    text = (ROOT / path).read_text()
    for option in options:
        assert option in text, f"{path} has no {option}"


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, lightning_parser, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # recipes are found by name from anywhere
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for line, (program, *words) in commands(page):
        where = f"{page}:{line}: {shlex.join([program, *words])}"
        try:
            if program == "zoo":
                with monkeypatch.context() as patch:
                    parse(words, lightning_parser, patch)
            elif program == "make":
                assert set(words) <= set(targets), where
            elif program in ("python", "python3") and words[0].endswith(".py"):
                check_script(words[0], [word.partition("=")[0] for word in words[1:] if word.startswith("--")])
        except SystemExit as exit_:
            if exit_.code:
                pytest.fail(f"{where}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text(page):
    """Commands and recipes that are named in passing."""
    text = (ROOT / page).read_text()
    assert set(re.findall(r"`zoo ([a-z][\w-]*)", text)) <= set(re.findall(r"^  (\w[\w-]*) ", HELP, re.M))
    folders = "|".join({recipe.partition("/")[0] for recipe in list_recipes()})
    assert set(re.findall(rf"`(?:--config )?((?:{folders})/\w+)`", text)) <= set(list_recipes())


@pytest.mark.parametrize("page", PAGES)
def test_python(page):
    for line, block in blocks(page, "python", "py"):
        where = f"{page}:{line}"
        for node in ast.walk(ast.parse(block, where)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{where}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES)
def test_recipes(page, lightning_parser, tmp_path):
    for _, block in blocks(page, "yaml"):
        (tmp_path / "own.yaml").write_text(block)
        under = [] if "base" in yaml.safe_load(block) else ["--config", "digits/dinat"]  # a part of a recipe
        lightning_parser.parse_args(resolve_recipes(["fit", *under, "--config", str(tmp_path / "own.yaml")]))


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Files and headings that links within the repository lead to."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings]
            assert heading in slugs, f"{page}: {target}"
