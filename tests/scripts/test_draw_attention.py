"""Pictures of attention: weights read off the operators, sets of the right size, files where they belong."""

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
NAMES = ["neighborhood", "dilated", "circular", "halo", "window", "shifted_window", "routed", "agent"]


@pytest.fixture
def draw_attention(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("draw_attention")


@pytest.fixture
def weights(draw_attention):
    """Function of the name of a picture: the weights behind it, and the queries and keys."""

    def compute(name):
        operator, options = draw_attention.OPERATORS[name]
        query, key = draw_attention.query_and_key(draw_attention.load_photograph(13), 13)
        call = lambda value: operator(query, key, value, **options)  # noqa: E731
        return draw_attention.attention_of(call, key, draw_attention.QUERY), query, key

    return compute


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("neighborhood", 7 * 7),
        ("dilated", 7 * 7),
        ("circular", sum(y * y + x * x < 8 * 8 for y in range(-8, 9) for x in range(-8, 9))),
        ("halo", 14 * 14),
        ("window", 8 * 8),
        ("shifted_window", 8 * 8),
        ("routed", 16 * 4 * 4),
        ("agent", 32 * 48),
    ],
)
def test_weights(weights, name, tokens):
    """They are a mean over as many tokens as the operator's definition says."""
    w, _, _ = weights(name)
    assert w.shape == (32, 48)
    assert w.min() >= 0
    assert int((w > 0).sum()) == tokens
    torch.testing.assert_close(w.sum(), torch.ones_like(w.sum()))


def test_weights_are_those_of_the_definition(draw_attention, weights):
    """In the plain neighborhood: softmax of the logits over the window around the query."""
    w, query, key = weights("neighborhood")
    y, x = draw_attention.QUERY
    window = slice(y - 3, y + 4), slice(x - 3, x + 4)
    logits = key[0, :, :, 0] @ query[0, y, x, 0] / query.shape[-1] ** 0.5
    expected = torch.zeros_like(w)
    expected[window] = logits[window].flatten().softmax(0).view(7, 7)
    torch.testing.assert_close(w, expected)


def test_draw(draw_attention, tmp_path):
    """On a tiny map: a picture per operator, and all of them side by side."""
    operators = {name: draw_attention.OPERATORS[name] for name in ("neighborhood", "routed")}
    files = draw_attention.draw(tmp_path / "new", operators, patch=26, token=(5, 6))
    assert files == [tmp_path / "new" / f"{name}.png" for name in ("neighborhood", "routed", "overview")]
    for file in files:
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 16


def test_documentation(draw_attention):
    """It shows every picture with the call that made it, and the pictures are small."""
    folder = ROOT / "docs" / "attention"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert list(draw_attention.OPERATORS) == NAMES
    for name, (operator, options) in draw_attention.OPERATORS.items():
        assert f"]({name}.png)" in text
        if name == "agent":
            call = f"agent_attention(query, key, value, pool_agents(query_map, {options['side']}))"
        else:
            call = f"{operator.__name__}(query, key, value, {', '.join(f'{k}={v}' for k, v in options.items())})"
        assert f"`{call}`" in text
        assert (folder / f"{name}.png").stat().st_size < 150_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
