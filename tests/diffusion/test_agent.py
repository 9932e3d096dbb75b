"""AgentSD: golden cases of the authors' code, and the processor inside a tiny UNet."""

import copy
import io
import logging
import re
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, HeunDiscreteScheduler, PNDMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounter

from golden_cases import list_cases, load_case, max_error
from tiny_models import make_call, make_model, run
from zoo.diffusion import AgentAttnProcessor, AgentPhase, EntropyScaledAttnProcessor, Grid, attach
from zoo.diffusion.agent import AgentCall, _BlockHook, _drop, attend
from zoo.diffusion.merging import match_tokens, merge_tokens, unmerge_tokens
from zoo.kernels import agent_attention

EARLY, LATE = AgentPhase(), AgentPhase(2, agent_ratio=None)
MERGE = AgentPhase(2, ratio=0.5, agent_ratio=None)
GOLDEN_BLOCKS = {  # size of the map, settings
    "block_defaults_16x16": ((16, 16), AgentPhase(2, ratio=0.5, agent_ratio=0.8)),
    "block_down2_32x32": ((32, 32), EARLY),
    "block_early_16x16": ((16, 16), EARLY),
    "block_early_16x24": ((16, 24), EARLY),
    "block_early_16x24_random": ((16, 24), EARLY),
    "block_early_18x14": ((18, 14), EARLY),
    "block_late_16x16": ((16, 16), AgentPhase(2, ratio=0.4, agent_ratio=0.5)),
    "block_late_16x24": ((16, 24), AgentPhase(2, ratio=0.4, agent_ratio=0.5)),
    "block_partial_16x16": ((16, 16), AgentPhase(4, ratio=0.3, agent_ratio=0.8)),
}


@pytest.fixture
def unet():
    return make_model("unet")


def numbers(text):
    return {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", text)}


@pytest.mark.parametrize("name", [name for name in list_cases("agentsd") if name.startswith("agent_attn")])
def test_golden_attention(name):
    case = load_case("agentsd", name)
    args, x = numbers(case.call), case.inputs["x"]
    attn = Attention(x.shape[2], heads=int(args["heads"]), dim_head=int(args["dim_head"]))
    attn.load_state_dict(case.state_dict)
    with torch.no_grad():
        out = attend(attn, x, case.inputs["agent"], args["k_scale2"], args["k_shortcut"])
        assert max_error(out, case.outputs["out"]) < 1e-5
        assert max_error(attend(attn, x), case.outputs["out_softmax"]) < 1e-5


def test_every_golden_block_is_tested():
    assert sorted(GOLDEN_BLOCKS) == [name for name in list_cases("agentsd") if name.startswith("block")]


@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_golden_block(name, monkeypatch):
    case = load_case("agentsd", name)
    size, phase = GOLDEN_BLOCKS[name]
    x, context, draw = case.inputs["x"], case.inputs["context"], case.outputs.get("rand_idx")
    draw = None if draw is None else draw[..., 0].long()
    args = {key: value for key, value in numbers(case.call).items() if key.startswith("k_")}
    processor = AgentAttnProcessor(phase, seed=None, **args)
    monkeypatch.setattr(processor, "_draw", lambda *_: draw)

    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).eval()
    block.load_state_dict(case.state_dict)
    block.attn1.set_processor(processor)
    block.register_forward_pre_hook(_BlockHook(0), with_kwargs=True)
    block.attn1.register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, "grid": Grid(*size).level(x.shape[1])}), with_kwargs=True
    )
    block.attn2.register_forward_pre_hook(_drop, with_kwargs=True)
    seen = []
    block.attn1.register_forward_hook(lambda layer, args, out: seen.append(out))
    with torch.no_grad():
        out = block(x, encoder_hidden_states=context, cross_attention_kwargs={"agent": AgentCall(phase)})
        assert max_error(seen[0], case.outputs["self_attn"]) < 1e-5
        assert max_error(out, case.outputs["out"]) < 1e-5

        normed = block.norm1(x)
        if name == "block_down2_32x32":
            assert max_error(normed, case.outputs["roundtrip"]) < 1e-5
            return
        matching = match_tokens(x, size, phase.cell, draw)
        merged, gathered = phase.counts(*size)
        roundtrip = unmerge_tokens(merge_tokens(normed, matching, merged), matching, merged)
        assert max_error(roundtrip, case.outputs["roundtrip"]) < 1e-5
        assert (gathered is None) == ("agent_tokens_sorted" not in case.outputs)
        if gathered is not None:
            agents = merge_tokens(normed, matching, gathered)[..., 0].sort(1).values
            assert max_error(agents, case.outputs["agent_tokens_sorted"]) < 1e-5


def test_published_settings():
    """The numbers of tokens at 512 x 512 that the authors' settings give."""
    phases = AgentAttnProcessor().phases
    assert list(phases) == [0, 20]
    assert phases[0].counts(64, 64) == (1638, 3840)  # 2458 tokens, 256 agents
    assert phases[20].counts(64, 64) == (1638, None)
    assert AgentPhase(4, ratio=0, agent_ratio=0.95).counts(64, 64) == (0, 3840)
    assert AgentPhase(2, ratio=0.4, agent_ratio=0.5).counts(64, 64) == (1638, None)
    processor = AgentAttnProcessor()
    assert [processor.phase_at(step) is phases[0] for step in (0, 19, 20, 49)] == [True, True, False, False]


def call_recorded(model, call, modules):
    """[(input, output)] of these modules in a call of the model."""
    seen = {}
    hooks = [m.register_forward_hook(lambda m, args, out: seen.__setitem__(m, (args[0], out))) for m in modules]
    run(model, call)
    for hook in hooks:
        hook.remove()
    return [seen[m] for m in modules]


def test_agents_without_merging(unet):
    """What the formula says, where the authors' code fails."""
    phase = AgentPhase(4, ratio=0, agent_ratio=0.95)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    attn = block.attn1
    with attach(unet, AgentAttnProcessor(phase, seed=None, k_scale2=0.5, k_shortcut=0.2)):
        records = call_recorded(unet, make_call("unet", 8, 12), [block.norm1, attn])
    (block_input, _), (x, actual) = records
    with torch.no_grad():
        agents = merge_tokens(x, match_tokens(block_input, (8, 12), (4, 4)), 90)  # 96 tokens, one of each cell stays
        q, k, v, a = (
            y.unflatten(-1, (attn.heads, -1)) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.to_q(agents))
        )
        scale = (8 // attn.heads) ** -0.5
        out = agent_attention(q, k, v, a, scale=scale, query_scale=scale**0.5, backend="reference") + 0.2 * v
        torch.testing.assert_close(actual, attn.to_out[0](out.flatten(2)))


def test_nothing_to_do_is_dense_attention(unet):
    call = make_call("unet", 8, 8)
    expected = run(unet, call)
    with attach(unet, AgentAttnProcessor(AgentPhase(2, ratio=0, agent_ratio=None))):
        torch.testing.assert_close(run(unet, call), expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (16, 24)])
def test_layers_of_lower_resolution_are_untouched(unet, size):
    call, layers = make_call("unet", *size), [m for name, m in unet.named_modules() if name.endswith(".attn1")]

    def changed(processor):
        """The stride of the layers whose output is not what diffusers computes, and of the others."""
        with attach(unet, processor):
            records = call_recorded(unet, call, layers)
        strides = [Grid(*size).level(x.shape[1]).stride for x, _ in records]
        with torch.no_grad():
            same = [torch.equal(layer(x), out) for layer, (x, out) in zip(layers, records)]
        return {s for s, equal in zip(strides, same) if not equal}, {s for s, equal in zip(strides, same) if equal}

    assert changed(AgentAttnProcessor(EARLY)) == ({1}, {2})
    assert changed(AgentAttnProcessor(AgentPhase(2), max_downsample=2)) == ({1, 2}, set())


def test_detaching_restores_the_model(unet):
    call = make_call("unet", 8, 8)
    weights, expected = {k: v.clone() for k, v in unet.state_dict().items()}, run(unet, call)
    processors = unet.attn_processors
    with attach(unet, AgentAttnProcessor(MERGE)):
        assert not torch.equal(run(unet, call), expected)
    assert torch.equal(run(unet, call), expected)
    assert unet.attn_processors == processors
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
    assert not any(m._forward_pre_hooks for m in unet.modules())


def test_seed_and_batch(unet):
    """The same draws for every batch, odd or even, but not for every seed, layer and step."""
    call = make_call("unet", 8, 8, batch=3)

    def sample(seed, batch=3, timestep=10):
        part = {k: v[:batch] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in call.items()}
        with attach(unet, AgentAttnProcessor(AgentPhase(4, ratio=0.5), seed=seed)):
            return run(unet, {**part, "timestep": torch.tensor(timestep)})

    three = sample(0)
    assert torch.equal(three, sample(0))
    for batch in (1, 2):
        torch.testing.assert_close(sample(0, batch), three[:batch])
    assert not torch.allclose(sample(1), three)
    assert not torch.allclose(sample(None), three)

    processor, device = AgentAttnProcessor(EARLY, seed=3), torch.device("cpu")
    draws = {
        key: processor._draw(AgentCall(EARLY, torch.tensor(key[0]), key[1]), (80, 84), device)
        for key in [(0, 0), (0, 1), (1, 0)]
    }
    assert all(draw.shape == (20, 21) for draw in draws.values())
    counts = torch.stack(list(draws.values())).flatten().bincount(minlength=16)
    assert len(counts) == 16 and counts.min() > 40 and counts.max() < 120  # 1260 draws from 16
    for a, b in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))]:
        assert (draws[a] != draws[b]).float().mean() > 0.85
    assert processor._draw(AgentCall(EARLY, 0, 0), (8, 8), device).tolist() == [[10, 0], [5, 11]]  # for good


class Pipeline(DiffusionPipeline):
    """What Stable Diffusion's does with prompts that are embedded already."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt_embeds, size, steps, guidance=2.0, callback_on_step_end=None):
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(len(prompt_embeds) // 2, 3, *size, generator=generator)
        self.scheduler.set_timesteps(steps)
        self.num_timesteps = len(self.scheduler.timesteps)
        latents = latents * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.scheduler.timesteps):
            both = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
            without, with_prompt = self.unet(both, t, encoder_hidden_states=prompt_embeds).sample.chunk(2)
            latents = self.scheduler.step(without + guidance * (with_prompt - without), t, latents).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {})
        return latents


PROMPTS = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(6))


def watch(processor, monkeypatch):
    """The steps whose settings are asked for."""
    steps, phase_at = [], AgentAttnProcessor.phase_at
    monkeypatch.setattr(processor, "phase_at", lambda step: steps.append(step) or phase_at(processor, step))
    return steps


def test_pipeline(unet, monkeypatch, caplog):
    pipeline = Pipeline(unet, DDIMScheduler())
    dense = pipeline(PROMPTS, (8, 8), steps=6)
    processor = AgentAttnProcessor({0: EARLY, 2: LATE})
    with attach(pipeline, processor), caplog.at_level(logging.WARNING):
        steps = watch(processor, monkeypatch)
        first = pipeline(PROMPTS, (8, 8), steps=6)
        assert steps == [0, 1, 2, 3, 4, 5]
        assert torch.equal(pipeline(PROMPTS, (8, 8), steps=6), first)  # the next image begins at its first step
        assert steps == 2 * [0, 1, 2, 3, 4, 5]
        processor.step = 0
        assert torch.equal(pipeline(PROMPTS, (8, 8), steps=6, callback_on_step_end=processor.on_step_end), first)
        assert processor.step == 0
        assert pipeline(PROMPTS[1:3], (9, 12), steps=1).shape == (1, 3, 9, 12)
    assert not caplog.records
    assert first.isfinite().all() and not torch.allclose(first, dense, atol=1e-3)
    for phase in (EARLY, LATE):
        with attach(pipeline, AgentAttnProcessor(phase)):
            assert not torch.allclose(pipeline(PROMPTS, (8, 8), steps=6), first, atol=1e-3)
    assert torch.equal(pipeline(PROMPTS, (8, 8), steps=6), dense)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()])
def test_steps_that_call_the_model_twice(unet, scheduler, monkeypatch):
    processor = AgentAttnProcessor({0: EARLY, 2: LATE})
    steps = watch(processor, monkeypatch)
    pipeline = Pipeline(unet, scheduler)
    with attach(pipeline, processor):
        pipeline(PROMPTS, (8, 8), steps=4)
        pipeline(PROMPTS, (8, 8), steps=4)
    assert sorted(set(steps)) == [0, 1, 2, 3]
    assert steps[: len(steps) // 2] == steps[len(steps) // 2 :] == sorted(steps[: len(steps) // 2])


def test_two_threads_share_a_unet(unet):
    processor = AgentAttnProcessor({0: EARLY, 2: LATE})
    pipelines = [Pipeline(unet, DDIMScheduler()) for _ in range(2)]
    calls = [((8, 8), 5), ((12, 8), 7)]
    with attach(unet, processor):
        expected = [pipeline(PROMPTS, *call) for pipeline, call in zip(pipelines, calls)]
        results = [None, None]

        def work(i):
            results[i] = [pipelines[i](PROMPTS, *calls[i]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert all(torch.equal(result, expected[i]) for result in results[i])


def through_a_file(unet):
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file])
def test_a_copy_counts_its_own_steps(unet, duplicate):
    call = make_call("unet", 8, 8)
    steps = [{**call, "timestep": torch.tensor(t)} for t in (500, 300)]
    with attach(unet, AgentAttnProcessor({0: EARLY, 1: LATE})):
        expected = [run(unet, step) for step in steps]
        twin = duplicate(unet)
        assert not torch.equal(run(twin, steps[1]), expected[1])  # the first step of the copy
        assert torch.equal(run(unet, steps[1]), expected[1])
        assert all(torch.equal(run(twin, step), out) for step, out in zip(steps, expected))


def test_without_attach(unet):
    """Through diffusers' own method, where the step and the size of the input have to be told."""
    call = make_call("unet", 12, 8)
    expected = run(unet, call)
    processor = AgentAttnProcessor({0: MERGE, 1: AgentPhase(2, ratio=0, agent_ratio=None)}, grid=(12, 8))
    unet.set_attn_processor(processor)
    processor.step = 0
    assert not torch.allclose(run(unet, call), expected, atol=1e-3)
    processor.step = 1
    torch.testing.assert_close(run(unet, call), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(unet, dtype):
    """Both phases stay near float32, whose matching may differ where tokens are equally alike."""
    call = make_call("unet", 8, 8)
    low = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    processor = AgentAttnProcessor({0: EARLY, 1: LATE})
    with attach(unet, processor):
        for step in (0, 1):
            processor.step = step
            expected, actual = run(unet.float(), call), run(unet.to(dtype), low)
            assert actual.dtype == dtype
            assert (actual.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_fused_projections(unet):
    call = make_call("unet", 8, 8)
    with attach(unet, AgentAttnProcessor(EARLY)):
        expected = run(unet, call)
    unet.fuse_qkv_projections()
    with attach(unet, AgentAttnProcessor(EARLY)):
        torch.testing.assert_close(run(unet, call), expected)


def test_gradient_checkpointing(unet):
    call = make_call("unet", 8, 8)
    unet.train()
    grads = []
    with attach(unet, AgentAttnProcessor(EARLY)):
        for _ in range(2):
            unet.zero_grad()
            unet(**call).sample.square().mean().backward()
            grads.append([p.grad.clone() for p in unet.parameters()])
            unet.enable_gradient_checkpointing()
    assert any(grad.any() for grad in grads[0])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_compiled():
    """Compiled anew for a phase, not for a step."""
    unet = make_model("unet", small=True)  # without attention on its first level, as SDXL
    call = make_call("unet", 16, 16)
    processor = AgentAttnProcessor({0: EARLY, 2: LATE}, max_downsample=2)
    graphs, counts = CompileCounter(), []
    with attach(unet, processor):
        compiled = torch.compile(unet, backend=graphs, fullgraph=True)
        for step in range(4):
            processor.step = step
            call["timestep"] = torch.tensor(30 - step)
            torch.testing.assert_close(run(compiled, call), run(unet, call))
            counts.append(graphs.frame_count)
        assert 0 < counts[0] == counts[1] < counts[2] == counts[3]
        processor.step = None
        with pytest.raises(Exception, match="set the processor's step to 0"):
            run(compiled, call)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(cell=0), ValueError, "cell must be at least 1 on both axes"),
        (dict(cell=2.5), TypeError, "cell must be one int or a"),
        (dict(ratio=1.5), ValueError, "ratio must be a share of the tokens between 0 and 1, got 1.5"),
        (dict(ratio=None), TypeError, "ratio must be a number, got None"),
        (dict(agent_ratio=-1), ValueError, "agent_ratio must be a share"),
        (dict(agent_ratio="all"), TypeError, "agent_ratio must be a number, got 'all'"),
    ],
)
def test_bad_phase(arguments, error, message):
    with pytest.raises(error, match=message):
        AgentPhase(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(phases=[EARLY]), TypeError, "phases must be an AgentPhase, or a mapping"),
        (dict(phases={0: "early"}), TypeError, "phases must be an AgentPhase, or a mapping"),
        (dict(phases={0.4: EARLY}), TypeError, r"phases must begin at steps that are ints, got \[0.4\]"),
        (dict(phases={5: EARLY}), ValueError, r"phases must begin at step 0, and none before, got \[5\]"),
        (dict(phases={}), ValueError, "phases must begin at step 0"),
        (dict(k_scale2="sharp"), TypeError, "k_scale2 must be a number"),
        (dict(max_downsample=0), ValueError, "max_downsample must be at least 1, got 0"),
        (dict(seed=1.0), TypeError, "seed must be an int"),
        (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_bad_processor(arguments, error, message):
    with pytest.raises(error, match=message):
        AgentAttnProcessor(**arguments)


def test_bad_step():
    processor = AgentAttnProcessor()
    with pytest.raises(TypeError, match="step must be an int or None, got 'first'"):
        processor.step = "first"
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        processor.step = -1
    assert processor.step is None


def test_bad_calls(unet):
    call, processor = make_call("unet", 8, 8), AgentAttnProcessor()
    with attach(unet, processor):
        with pytest.raises(ValueError, match=r"timestep must be the same for the whole batch.* set the processor's"):
            run(unet, {**call, "timestep": torch.tensor([3, 4])})
        with pytest.raises(ValueError, match=r"cell may not exceed the map: 4x4 in .*attn1, which has 3x8 tokens"):
            run(unet, make_call("unet", 3, 8))
        with pytest.raises(ValueError, match="attention_mask must be None for AgentAttnProcessor"):
            run(unet, {**call, "attention_mask": torch.ones(2, 64)})
    unet.set_attn_processor(processor)
    with pytest.raises(ValueError, match="grid is unknown, and with it the level of the UNet"):
        run(unet, call)
    unet.set_attn_processor(AgentAttnProcessor(grid=(8, 8)))
    with pytest.raises(ValueError, match="step is unknown"):
        run(unet, call)


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_other_models(kind):
    model = make_model(kind)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    with pytest.raises(ValueError, match="AgentAttnProcessor is for UNet2DConditionModel, got"):
        attach(model, AgentAttnProcessor())
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_is_no_part_of_another_processor():
    with pytest.raises(TypeError, match="processor must be told the scale by `attend`"):
        EntropyScaledAttnProcessor(64, AgentAttnProcessor())
