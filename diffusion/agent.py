"""AgentSD: token merging and agent attention inside a pretrained UNet, without training.

Paper: `Agent Attention` (https://arxiv.org/abs/2312.08874), on top of `Token Merging for Fast Stable Diffusion`
(https://arxiv.org/abs/2303.17604).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from zoo.diffusion.grid import Grid
from zoo.diffusion.merging import match_tokens, merge_tokens, unmerge_tokens
from zoo.diffusion.processor import GridAttnProcessor, _cross_attention, _project, dense_attention
from zoo.kernels import agent_attention
from zoo.kernels._checks import positive_pair


@dataclass(frozen=True)
class AgentPhase:
    """What `AgentAttnProcessor` does during a part of the sampling. The defaults are the authors' for its beginning.

    Args:
        cell: Side of the cells, or (height, width), in tokens (`sy` and `sx` in the authors' code). Every cell keeps
            one destination, so at most 1 - 1 / (height * width) of the tokens merge.
        ratio: Share of the tokens that merge into others before attention, 0 for none.
        agent_ratio: Share of the tokens that merge to make the agents, or None for no agents. They are used where they
            are fewer than half of the tokens that attention is left with.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A cell is empty, or a share is not in [0, 1].
    """

    cell: int | tuple[int, int] = 4
    ratio: float = 0.4
    agent_ratio: float | None = 0.95

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", positive_pair("cell", self.cell))
        for name in ("ratio", "agent_ratio"):
            value = getattr(self, name)
            if value is None and name == "agent_ratio":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share of the tokens between 0 and 1, got {value}")

    def counts(self, height: int, width: int) -> tuple[int, int | None]:
        """How many tokens of a map merge, and how many do to make the agents, None where these are not used."""
        tokens = height * width
        sources = tokens - (height // self.cell[0]) * (width // self.cell[1])
        merged = min(int(tokens * self.ratio), sources)
        gathered = None if self.agent_ratio is None else min(int(tokens * self.agent_ratio), sources)
        if gathered is not None and not _are_few(tokens - gathered, tokens - merged):
            gathered = None
        return merged, gathered


# The authors' settings for 50 steps: agents for the first 20, then merging alone.
AGENT_SD_PHASES = {0: AgentPhase(4, ratio=0.4, agent_ratio=0.95), 20: AgentPhase(2, ratio=0.4, agent_ratio=None)}


class AgentCall(NamedTuple):
    """What `attach` hands to `AgentAttnProcessor` with every call of a layer.

    Attributes:
        phase: The settings of the step.
        noise: 0-dimensional integers, by which the draws of one step differ from those of another.
        layer: Number of the layer, by which its draws differ from those of others.
        block_input: [batch, tokens, channels], what the transformer block was given: tokens are matched by that.
    """

    phase: AgentPhase
    noise: Tensor | int = 0
    layer: int = 0
    block_input: Tensor | None = None


class AgentAttnProcessor(GridAttnProcessor):
    """AgentSD: self-attention of fewer tokens, through agents, in the layers of high resolution of a UNet.

    Similar tokens are merged before attention and share its result. In early steps a second, stronger merge of the same
    tokens makes the agents, which gather from the merged tokens and are read by them: with `scale = head_dim ** -0.5`,

        out = softmax(scale ** k_scale2 * q a^T) softmax(scale * a k^T) v + k_shortcut * v

    Tokens that a block of the UNet is given are matched afresh in each, before its first norm.

    `zoo.diffusion.attach` tells the processor what it needs in every call. The step is counted from the timesteps of
    the calls: a lower one than in the call before is the next step, a higher one the first step of another image.
    Reading it waits for the device. Where that is not wanted, and always where the whole UNet is compiled, set `step`
    to 0 and call the pipeline with `callback_on_step_end=processor.on_step_end`. Without `attach`, by
    `unet.set_attn_processor(processor)`, `step` has to be set too, and the tokens are matched after the norm.

    Papers: Agent Attention (https://arxiv.org/abs/2312.08874), token merging (https://arxiv.org/abs/2303.17604).

    Args:
        phases: One `AgentPhase` for all steps, or the first step, counted from 0, of each: {0: ..., 20: ...}. The
            default are the authors' settings for 50 steps. For other numbers of steps they published none; to keep the
            share, change after two fifths of them.
        k_scale2: Power of the scale with which agents are read; 1 is the plain scale, less is sharper.
        k_shortcut: How much of its own value every token adds where agents are used.
        max_downsample: Largest stride of the layers that change, in tokens of the UNet's input: 1 is the first level
            only. SDXL has no attention there, so it takes 2.
        seed: Destinations are drawn from the cells by this number. The draws differ between steps and layers, and
            are the same for every batch, device and run. None takes the first token of every cell.
        grid: (height, width) of the UNet's input, for `unet.set_attn_processor`. None takes the grid that `attach`
            hands over.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        phases: AgentPhase | Mapping[int, AgentPhase] = AGENT_SD_PHASES,
        *,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
        max_downsample: int = 1,
        seed: int | None = 0,
        grid: Grid | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(grid)
        self.phases = _check_phases(phases)
        for name, value in (("k_scale2", k_scale2), ("k_shortcut", k_shortcut)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
        for name, value, least in (("max_downsample", max_downsample, 1), ("seed", 0 if seed is None else seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.k_scale2 = k_scale2
        self.k_shortcut = k_shortcut
        self.max_downsample = max_downsample
        self.seed = seed
        self.step = None

    @property
    def step(self) -> int | None:
        """The sampler's step, counted from 0, or None to count it from the timesteps of the calls."""
        return self._step

    @step.setter
    def step(self, step: int | None) -> None:
        if step is not None:
            if not isinstance(step, int) or isinstance(step, bool):
                raise TypeError(f"step must be an int or None, got {step!r}")
            if step < 0:
                raise ValueError(f"step must be at least 0, got {step}")
        self._step = step
        # Compiled code reads this and not the step: it changes once, not in every step.
        self._phase = None if step is None else self.phase_at(step)

    def phase_at(self, step: int) -> AgentPhase:
        """The settings of a step."""
        return self.phases[max(first for first in self.phases if first <= step)]

    def on_step_end(self, pipeline, step: int, timestep, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Count the steps as a pipeline's `callback_on_step_end`; after the last one the next image's first follows."""
        self.step = step + 1 if step + 1 < pipeline.num_timesteps else 0
        return callback_kwargs

    def check(self, grid: Grid, layer: str) -> None:
        if grid.stride > self.max_downsample:
            return
        for phase in self.phases.values():
            if phase.cell[0] > grid.height or phase.cell[1] > grid.width:
                raise ValueError(
                    f"cell may not exceed the map: {phase.cell[0]}x{phase.cell[1]} in {layer}, which has "
                    f"{grid.height}x{grid.width} tokens; take smaller cells, a lower max_downsample or a larger image"
                )

    def pre_hooks(self, model: nn.Module, layers: list[str]) -> list[tuple[nn.Module, Callable]]:
        """Forward pre-hooks, of arguments and keywords, with which `attach` hands every call an `AgentCall`.

        Raises:
            ValueError: The model or a layer is of a kind that is not supported.
        """
        if not isinstance(model, UNet2DConditionModel):
            raise ValueError(f"AgentAttnProcessor is for UNet2DConditionModel, got {type(model).__name__}")
        hooks = [(model, _ModelHook(self))]
        for index, name in enumerate(layers):
            block = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(block, BasicTransformerBlock):
                raise ValueError(f"{name} must lie in a BasicTransformerBlock, got {type(block).__name__}")
            hooks.append((block, _BlockHook(index)))
        hooks += [(m, _drop) for name, m in model.named_modules() if isinstance(m, Attention) and name not in layers]
        return hooks

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Grid | None = None,
        agent: AgentCall | None = None,
    ) -> Tensor:
        """What diffusers' own processor returns for `attn`, cross-attention and low resolutions being left to that.

        Raises:
            ValueError: The grid or the step is unknown, the grid does not match the number of tokens, or there is an
                `attention_mask`.
        """
        untouched = encoder_hidden_states is not None or hidden_states.ndim != 3
        if not untouched:
            if grid is None:
                grid = self._find_grid(attn, hidden_states.shape[1], 0)
                self.check(grid, "the attention layer")
            untouched = grid.stride > self.max_downsample
        if untouched:
            return _cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask, None)
        if attention_mask is not None:
            raise ValueError("attention_mask must be None for AgentAttnProcessor: merged tokens have no place in it")

        call = agent or self._find_call()
        merged, gathered = call.phase.counts(grid.height, grid.width)
        if merged or gathered is not None:
            seen = hidden_states if call.block_input is None else call.block_input
            size = grid.height, grid.width
            matching = match_tokens(seen, size, call.phase.cell, self._draw(call, size, seen.device))
        agents = None if gathered is None else merge_tokens(hidden_states, matching, gathered)
        if merged:
            hidden_states = merge_tokens(hidden_states, matching, merged)
        hidden_states = attend(attn, hidden_states, agents, self.k_scale2, self.k_shortcut)
        return unmerge_tokens(hidden_states, matching, merged) if merged else hidden_states

    def _find_grid(self, attn: nn.Module, tokens: int, text: int) -> Grid:
        if self.grid is None:
            raise ValueError(
                "grid is unknown, and with it the level of the UNet: use zoo.diffusion.attach(), which derives it in "
                "every call, or give the processor grid=(height, width) of the UNet's input"
            )
        return self.grid.level(tokens)

    def _find_call(self) -> AgentCall:
        if self._phase is not None:
            return AgentCall(self._phase, self._step)
        if len(self.phases) > 1:
            raise ValueError(
                "step is unknown: use zoo.diffusion.attach(), which counts the steps, or set the processor's step to 0 "
                "and call the pipeline with callback_on_step_end=processor.on_step_end"
            )
        return AgentCall(self.phases[0])

    def _draw(self, call: AgentCall, size: tuple[int, int], device: torch.device) -> Tensor | None:
        """Which token of every cell is the destination, [rows of cells, columns of cells]."""
        if self.seed is None:
            return None
        (rows, cols), (height, width) = call.phase.cell, size
        cells = torch.arange((height // rows) * (width // cols), device=device).view(height // rows, width // cols)
        noise = torch.as_tensor(call.noise, device=device)
        return _scramble(_scramble(_scramble(_scramble(noise) + call.layer) + self.seed) + cells) % (rows * cols)


def attend(
    attn: Attention, tokens: Tensor, agents: Tensor | None = None, k_scale2: float = 0.3, k_shortcut: float = 0.075
) -> Tensor:
    """Self-attention of `attn` through agents, which share its queries' projection.

    Args:
        attn: The module with the weights.
        tokens: [batch, tokens, channels].
        agents: [batch, agents, channels]. Without them, or where they are not fewer than half of the tokens, attention
            is dense.
        k_scale2: Power of the scale with which agents are read.
        k_shortcut: How much of its own value every token adds where agents are used.

    Returns:
        [batch, tokens, channels].
    """
    query, key, value = _project(attn, tokens, "to_q", "to_k", "to_v", "to_qkv", ("norm_q", "norm_k"))
    scale = query.shape[-1] ** -0.5
    if agents is None or not _are_few(agents.shape[1], tokens.shape[1]):
        out = dense_attention(query, key, value, scale)
    else:
        agents = attn.to_q(agents).unflatten(-1, (attn.heads, -1))
        agents = agents if attn.norm_q is None else attn.norm_q(agents)
        out = agent_attention(query, key, value, agents, scale=scale, query_scale=scale**k_scale2) + k_shortcut * value
    return attn.to_out[1](attn.to_out[0](out.flatten(2))) / attn.rescale_output_factor


class _ModelHook:
    """Before the UNet's forward: sends the settings of the step down to all attention layers."""

    def __init__(self, processor: AgentAttnProcessor) -> None:
        self.processor = processor
        self.parameters = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
        self.count = threading.local()  # two threads that share a UNet are at different steps

    def __reduce__(self):
        return _ModelHook, (self.processor,)  # a copy of the UNet counts its own steps, and a count is of a thread

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        call = {**dict(zip(self.parameters, args)), **kwargs}
        carried = call.get("cross_attention_kwargs") or {}
        if "agent" in carried or "timestep" not in call or len(args) > len(self.parameters):
            return None
        timestep = torch.as_tensor(call["timestep"], device=call["sample"].device).flatten()
        agent = AgentCall(self._phase(timestep), timestep[0].float().view(torch.int32).long())
        return (), {**call, "cross_attention_kwargs": {**carried, "agent": agent}}

    def _phase(self, timestep: Tensor) -> AgentPhase:
        phases = self.processor.phases
        if self.processor._phase is not None or len(phases) == 1:
            return self.processor._phase or phases[0]
        if torch.compiler.is_compiling():
            raise ValueError(
                "the step is counted from the values of the timesteps, which cannot be read while the whole UNet is "
                "compiled: set the processor's step to 0 and call the pipeline with "
                "callback_on_step_end=processor.on_step_end"
            )
        values = timestep.unique().tolist()
        if len(values) > 1:
            raise ValueError(
                f"timestep must be the same for the whole batch to count the steps, got {values}; "
                "set the processor's step"
            )
        last, step = getattr(self.count, "state", (None, 0))
        if last is not None and values[0] != last:
            step = step + 1 if values[0] < last else 0
        self.count.state = values[0], step
        return self.processor.phase_at(step)


class _BlockHook:
    """Before a transformer block's forward: adds what the block is given, which attention sees normed only."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.parameters = tuple(inspect.signature(BasicTransformerBlock.forward).parameters)[1:]

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        call = {**dict(zip(self.parameters, args)), **kwargs}
        carried = call.get("cross_attention_kwargs") or {}
        if "agent" not in carried:
            return None
        agent = carried["agent"]._replace(layer=self.layer, block_input=call["hidden_states"])
        return (), {**call, "cross_attention_kwargs": {**carried, "agent": agent}}


def _are_few(agents: int, tokens: int) -> bool:
    """Whether attention through agents is worth it: they are fewer than half of the tokens."""
    return 2 * agents < tokens


def _drop(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before the forward of an attention layer with another processor, which would warn of what it does not know."""
    kwargs.pop("agent", None)
    return args, kwargs


def _scramble(x: Tensor) -> Tensor:
    """32 bits that look random from each integer of `x`: a generator without a state, the same on every device."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF  # a product of 59 bits, so nothing overflows
    return x ^ (x >> 16)


def _check_phases(phases) -> dict[int, AgentPhase]:
    phases = {0: phases} if isinstance(phases, AgentPhase) else phases
    if not isinstance(phases, Mapping) or not all(isinstance(phase, AgentPhase) for phase in phases.values()):
        raise TypeError(f"phases must be an AgentPhase, or a mapping from first steps to them, got {phases!r}")
    if not all(isinstance(first, int) and not isinstance(first, bool) for first in phases):
        raise TypeError(f"phases must begin at steps that are ints, got {list(phases)}")
    if min(phases, default=None) != 0:
        raise ValueError(f"phases must begin at step 0, and none before, got {list(phases)}")
    return dict(phases)
