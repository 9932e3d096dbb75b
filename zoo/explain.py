"""``zoo explain``: what a classifier answers, where it looks (Grad-CAM), and what one token attends to."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo import kernels
from zoo.classifier import load_classifier, read_image
from zoo.data.loading import printable
from zoo.errors import UserError
from zoo.files import check_output
from zoo.pictures import save_explanation

OPERATORS = (
    kernels.agent_attention,
    kernels.circular_attention_2d,
    kernels.halo_attention_2d,
    kernels.neighborhood_attention_2d,
    kernels.neighborhood_attention_2d_qkvpacked,
    kernels.routing_attention_2d,
    kernels.window_attention_2d,
)
PANELS = 6


class Grid(NamedTuple):
    """How tokens lie on the image: rows of columns, after tokens that are none of the image's."""

    rows: int
    columns: int
    prefix: int = 0


class AttentionCall(NamedTuple):
    """One call of an attention operator over the whole image.

    Attributes:
        label: The operator and its options, in words.
        attend: The call as a function of the values, [1, rows, columns, heads, dim] -> the outputs of the same form.
        values: Something of the values' shape.
        grid: Of the values, and so of what is attended to.
    """

    label: str
    attend: Callable[[Tensor], Tensor]
    values: Tensor
    grid: Grid


def run_explain(image: str, model: str | None, checkpoint: str | None, pretrained: bool, output: str) -> None:
    """Draw the picture, and say what is in it and where it is."""
    if Path(output).suffix.lower() != ".png":
        raise UserError(f"--output: expected a file name that ends in .png, got {output}")
    check_output(output)
    photograph = read_image(image)
    classifier = load_classifier(model, checkpoint, pretrained)
    x = classifier.prepare(photograph).unsqueeze(0)

    probabilities, cam = grad_cam(classifier.model, x)
    names = classifier.classes or [f"class {i}" for i in range(len(probabilities))]
    top = probabilities.topk(min(5, len(probabilities)))
    answers = [(names[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())]
    # The query is the token where the evidence is strongest, so that the panels are about what the answer rests on.
    row, column = divmod(int(cam.argmax()), cam.shape[1])
    point = (row + 0.5) / cam.shape[0], (column + 0.5) / cam.shape[1]
    calls = record_attention(classifier.model, x)
    panels = [(f"{number} of {len(calls)}: {call.label}", *attention_at(call, point)) for number, call in choose(calls)]

    note = {
        "random": "random weights, untrained: this shows the model's form, not knowledge",
        "published": "published weights",
    }
    weights = note.get(classifier.weights, f"weights of {classifier.weights}")
    pixels = classifier.pixels(x[0])
    save_explanation(Path(output), pixels, answers, cam, point, panels, f"{classifier.name}: {weights}")
    print(f"{classifier.name}, {weights}")
    for name, probability in answers:
        print(f"  {probability:6.1%}  {printable(name)}")
    if not panels:
        print("no attention over the whole map was seen in this model, so the picture has none")
    print(f"picture: {output}")


# Grad-CAM


def grad_cam(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities of one image, and where the evidence for the most likely class is.

    Grad-CAM (https://arxiv.org/abs/1610.02391) of the last map of tokens on which the answer depends everywhere: before
    the pooling, or in a model that answers from a class token before the last attention. The map is found by watching
    the modules run, so any classifier of timm's will do.

    Args:
        model: In evaluation mode.
        x: [1, channels, height, width].

    Returns:
        [classes], and [rows, columns] from 0 to 1, or all 0 where nothing speaks for the class.

    Raises:
        UserError: The model has no classes, or none of its modules returns such a map.
    """
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad and _features_last(model, x, out) is not None:
            seen.append(out)

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with torch.enable_grad():
            logits = model(x.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"the model gives outputs of shape {tuple(logits.shape)}, expected [1, classes]")
    if not seen:
        raise UserError("Grad-CAM needs a module that returns a map of the model's features, and found none")
    cam = torch.zeros(_features_last(model, x, seen[-1]).shape[:2])
    grads = torch.autograd.grad(logits.max(), seen, allow_unused=True)
    for out, grad in zip(reversed(seen), reversed(grads)):
        if grad is not None and (grad := _features_last(model, x, grad)).any():
            cam = (_features_last(model, x, out.detach()) * grad.mean((0, 1))).sum(-1).relu()
            break
    return logits[0].detach().softmax(-1), cam / cam.max().clamp(min=1e-30)


def _features_last(model: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
    """A map of the model's features as [rows, columns, features], or None if it is something else."""
    features = model.num_features
    if out.ndim == 4 and out.shape[0] == 1 and features in (out.shape[1], out.shape[3]):
        out = out[0].permute(1, 2, 0) if out.shape[1] == features else out[0]
    elif out.ndim == 3 and out.shape[0] == 1 and out.shape[2] == features:
        grid = grid_of(out.shape[1], x.shape[-2:], getattr(model, "num_prefix_tokens", 0))
        out = None if grid is None else out[0, grid.prefix :].unflatten(0, grid[:2])
    else:
        return None
    return out if out is not None and out.shape[0] * out.shape[1] > 1 else None


# Attention


def attention_of(attend: Callable[[Tensor], Tensor], values: Tensor, token: tuple[int, int]) -> Tensor:
    """Weights of one token's attention, [rows, columns], the mean over heads; zero where it sees nothing.

    The output is a weighted sum of the values, so its gradient with respect to the values is the weights.

    Args:
        attend: Attention as a function of the values, [1, rows, columns, heads, dim] -> the outputs of the same form.
        values: Something of the values' shape.
        token: Row and column of the token that asks.
    """
    values = torch.zeros_like(values, requires_grad=True)
    with torch.enable_grad():
        out = attend(values)
        (weights,) = torch.autograd.grad(out[(0, *token)][:, 0].mean(), values)
    return weights[0, ..., 0].sum(-1)


def attention_at(call: AttentionCall, point: tuple[float, float]) -> tuple[Tensor, tuple[int, int]]:
    """The weights of the token that covers a point (0 to 1 from the top and from the left), and that token's place."""
    with torch.no_grad():
        rows, columns = call.attend(call.values).shape[1:3]  # there may be fewer queries than values, or more
    token = int(point[0] * rows), int(point[1] * columns)
    weights = attention_of(call.attend, call.values, token)
    return weights, (int(point[0] * call.grid.rows), int(point[1] * call.grid.columns))


def record_attention(model: nn.Module, x: Tensor) -> list[AttentionCall]:
    """Every call of an attention operator over the whole of one image, as the model runs.

    These are our operators and torch's `scaled_dot_product_attention`; calls on windows that were cut out of the map
    before, and on maps that were padded, are left out.

    Args:
        model: Any model.
        x: [1, channels, height, width].
    """
    calls: list[AttentionCall] = []

    def record(operator: Callable, args: tuple, kwargs: dict) -> None:
        call = _as_map_call(operator, args, kwargs, x.shape[-2:], getattr(model, "num_prefix_tokens", 0))
        if call is not None:
            calls.append(call)

    with torch.no_grad(), _watch_operators(record):
        model(x)
    return calls


def choose(calls: list[AttentionCall]) -> list[tuple[int, AttentionCall]]:
    """The calls that show most, numbered from 1: the first of each kind, or some from all depths."""
    kinds: dict[tuple, int] = {}
    for i, call in enumerate(calls):
        kinds.setdefault((call.label, call.grid), i)
    chosen = list(kinds.values()) if len(kinds) > 2 else list(range(len(calls)))
    most = PANELS if len(kinds) > 2 else PANELS // 2
    steps = min(most, len(chosen))
    chosen = [chosen[i * (len(chosen) - 1) // max(1, steps - 1)] for i in range(steps)]
    return [(i + 1, calls[i]) for i in chosen]


def grid_of(tokens: int, size: tuple[int, int], prefix: int) -> Grid | None:
    """The grid of equal patches into which so many tokens divide an image of `size`, or None if they do not."""
    for first in {prefix, 0}:
        count = tokens - first
        rows = round((max(count, 0) * size[0] / size[1]) ** 0.5)
        if rows and rows * (count // rows) == count and _tiles(rows, count // rows, size):
            return Grid(rows, count // rows, first)
    return None


def _tiles(rows: int, columns: int, size: tuple[int, int]) -> bool:
    """Whether a map of `rows` x `columns` is what an image of `size` becomes at some stride."""
    height, width = size
    strides = {max(1, height // rows), -(-height // rows)}
    return any(-(-height // s) == rows and -(-width // s) == columns for s in strides)


@contextmanager
def _watch_operators(record: Callable[[Callable, tuple, dict], None]) -> Iterator[None]:
    """Tell `record` of each outermost call of an attention operator that the models make."""
    inside = False

    def watched(operator: Callable) -> Callable:
        @wraps(operator)
        def call(*args, **kwargs):
            nonlocal inside
            if inside:
                return operator(*args, **kwargs)
            record(operator, args, kwargs)
            inside = True
            try:
                return operator(*args, **kwargs)
            finally:
                inside = False

        return call

    class Watch(TorchFunctionMode):
        def __torch_function__(self, operator, types, args=(), kwargs=None):
            call = watched(operator) if operator is F.scaled_dot_product_attention else operator
            return call(*args, **(kwargs or {}))

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("zoo.backbones.") or name == "zoo.accelerate":
                for operator in OPERATORS:
                    if getattr(module, operator.__name__, None) is operator:
                        stack.enter_context(patch.object(module, operator.__name__, watched(operator)))
        stack.enter_context(Watch())
        yield


def dense_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's `scaled_dot_product_attention` of tensors [..., tokens, heads, dim]."""
    out = F.scaled_dot_product_attention(*(x.movedim(-2, -3) for x in (query, key, value)), **options)
    return out.movedim(-3, -2)


def _as_map_call(
    operator: Callable, args: tuple, kwargs: dict, size: tuple[int, int], prefix: int
) -> AttentionCall | None:
    """A call as a function of the values on a grid, or None where they are no grid over the image."""
    if operator is F.scaled_dot_product_attention:
        options = {**dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)), **kwargs}
        options |= {name: options[name].movedim(-3, -2) for name in ("query", "key", "value")}
        operator = dense_attention
    else:
        options = inspect.signature(operator).bind(*args, **kwargs).arguments
    if operator is kernels.neighborhood_attention_2d_qkvpacked:
        options |= dict(zip(("query", "key", "value"), options.pop("qkv").unbind(3)))
        operator = kernels.neighborhood_attention_2d
    sequence, label = operator in (dense_attention, kernels.agent_attention), _in_words(operator, options)
    value = options.pop("value")
    call = partial(operator, **options)
    if value.shape[0] != 1 or value.ndim != (4 if sequence else 5):
        return None
    if not sequence:
        grid = Grid(*value.shape[1:3])
        return AttentionCall(label, lambda v: call(value=v), value, grid) if _tiles(*grid[:2], size) else None

    grids = [grid_of(x.shape[1], size, prefix) for x in (options["query"], value)]
    if None in grids:
        return None
    of_query, of_value = grids

    def attend(values: Tensor) -> Tensor:
        tokens = torch.cat([torch.zeros_like(value[:, : of_value.prefix]), values.flatten(1, 2)], 1)
        return call(value=tokens)[:, of_query.prefix :].unflatten(1, of_query[:2])

    return AttentionCall(label, attend, value[:, of_value.prefix :].unflatten(1, of_value[:2]), of_value)


def _in_words(operator: Callable, options: dict[str, Any]) -> str:
    """The operator's name and its options but for tensors and scales: "neighborhood, kernel size 7 x 7"."""
    words = [operator.__name__.replace("_attention", "").replace("_2d", "")]
    for name, value in options.items():
        if isinstance(value, int | tuple) and value not in (0, 1, (0, 0), (1, 1)):  # these are to say "none"
            words.append(
                f"{name.replace('_', ' ')} {' x '.join(map(str, value if isinstance(value, tuple) else [value]))}"
            )
    return ", ".join(words)
