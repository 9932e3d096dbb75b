"""Token merging against an explicit loop over tokens."""

import pytest
import torch

from zoo.diffusion.merging import match_tokens, merge_tokens, unmerge_tokens


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(x, y, size, cell, draw, count):
    """`y` merged by the likeness of `x` and unmerged again, and the means, one sample and token at a time."""
    (height, width), (rows, cols) = size, cell
    destinations = sorted(
        (i * rows + int(d) // cols) * width + j * cols + int(d) % cols
        for i, row in enumerate(draw)
        for j, d in enumerate(row)
    )
    sources = [t for t in range(height * width) if t not in destinations]
    out, means = y.clone(), []
    for b in range(len(x)):
        matches = []
        for source in sources:
            likeness = [torch.cosine_similarity(x[b, source], x[b, d], dim=0).item() for d in destinations]
            best = max(range(len(destinations)), key=lambda i: likeness[i])
            matches.append((likeness[best], source, destinations[best]))
        matches.sort(key=lambda match: -match[0])
        groups = {d: [d] for d in destinations}
        for _, source, target in matches[:count]:
            groups[target].append(source)
        for group in groups.values():
            out[b, group] = y[b, group].mean(0)
        kept = [y[b, source] for _, source, _ in matches[count:]]
        means.append(torch.stack(kept + [y[b, groups[d]].mean(0) for d in destinations]))
    return torch.stack(means), out


@pytest.mark.parametrize("count", [0, 9, 22])
@pytest.mark.parametrize(("size", "cell"), [((7, 8), (2, 3)), ((6, 5), (3, 5)), ((5, 6), (1, 4))])
def test_is_what_a_loop_computes(size, cell, count):
    tokens, cells = size[0] * size[1], (size[0] // cell[0], size[1] // cell[1])
    x, y = random(2, tokens, 4), random(2, tokens, 3, seed=1)
    draw = torch.randint(cell[0] * cell[1], cells, generator=torch.Generator().manual_seed(2))
    matching = match_tokens(x, size, cell, draw)
    assert matching.destinations.numel() == cells[0] * cells[1]
    assert matching.sources.shape == matching.targets.shape == (2, tokens - cells[0] * cells[1])
    merged = merge_tokens(y, matching, count)
    expected, restored = loop(x, y, size, cell, draw, count)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(unmerge_tokens(merged, matching, count), restored)


def test_takes_the_first_token_of_a_cell_by_default():
    matching = match_tokens(random(1, 20, 3), (4, 5), (2, 2))
    assert matching.destinations.tolist() == [0, 2, 10, 12]  # the last column belongs to no cell


def test_equal_tokens_are_ranked_in_their_order():
    matching = match_tokens(torch.ones(1, 16, 3), (4, 4), (2, 2))
    assert matching.sources.tolist() == [[1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15]]
    assert not matching.targets.any()


def test_zeros_are_finite():
    x = torch.zeros(1, 16, 3)
    x[:, 5:] = random(1, 11, 3, dtype=torch.float32)
    matching = match_tokens(x, (4, 4), (4, 4))
    assert set(matching.sources[0].tolist()) == set(range(1, 16))
    for dtype in (torch.float16, torch.bfloat16):
        assert merge_tokens(x.to(dtype), match_tokens(x.to(dtype), (4, 4), (4, 4)), 15).isfinite().all()


def test_similarities_in_parts(monkeypatch):
    x = random(2, 64, 5)
    whole = match_tokens(x, (8, 8), (2, 4))
    monkeypatch.setattr("zoo.diffusion.merging._CHUNK", 100)
    for a, b in zip(match_tokens(x, (8, 8), (2, 4)), whole):
        assert torch.equal(a, b)


def test_gradients():
    x = random(2, 20, 3).requires_grad_()
    matching = match_tokens(x, (4, 5), (2, 2))
    torch.autograd.gradcheck(lambda x: unmerge_tokens(merge_tokens(x, matching, 9).square(), matching, 9), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), (2, 2)), r"x must be \[batch, 4 \* 4 tokens, channels\], got shape \(1, 20, 3\)"),
        (((4, 5), (5, 2)), "cell may not exceed the map, got cells of 5x2 on a map of 4x5"),
        (((4, 5), (2, 2), torch.zeros(2, 3)), r"draw must have an entry for each of 2x2 cells, got \(2, 3\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_tokens(random(1, 20, 3), *arguments)
