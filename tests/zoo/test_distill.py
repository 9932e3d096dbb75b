"""Distillation into local attention: what is trained, shared, compared and saved."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from zoo.data import CachedLatents, TeacherLatents
from zoo.diffusion import ClearAttnProcessor, attach, load_clear_weights
from zoo.distill import ClearDistillation, pack, unpack
from zoo.errors import UserError

TINY = dict(
    in_channels=4,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=8,
    pooled_projection_dim=6,
    axes_dims_rope=(4, 6, 6),
)


def make_task(seed=0, **options):
    torch.manual_seed(seed)
    return ClearDistillation(config=TINY, **{"radius": 2, "flow_matching": 0.0, "lr": 1e-2, **options})


def make_batch():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(latents=(2, 1, 8, 12), prompt_embeds=(2, 5, 8), pooled_prompt_embeds=(2, 6))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loss_of(task, batch, seed=0):
    task.log = task.log_dict = lambda *args, **kwargs: None
    torch.manual_seed(seed)
    return task.training_step(batch, 0)


def trainer(tmp_path, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**quiet, **options})


def test_pack():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4].view(3, 2, 2), latents[1, :, 2:4, 2:4])
    assert torch.equal(unpack(tokens, 4, 6), latents)


@pytest.mark.parametrize("down_factor", [None, 2])
def test_only_the_students_attention_is_trained(down_factor):
    task = make_task(down_factor=down_factor)
    loss_of(task, make_batch()).backward()
    student, teacher = dict(task.transformer.named_parameters()), dict(task.teacher.named_parameters())
    trained = {name for name, p in student.items() if p.requires_grad}
    weights = {"to_q", "to_k", "to_v", "to_out", "processor"}
    assert trained == {name for name in student if ".attn." in name and name.split(".")[3] in weights}
    assert len(trained) == 2 * 8 + 3 * 6 + (5 if down_factor else 0)
    assert all(student[name].grad.abs().max() > 0 for name in trained if not name.endswith("to_k.bias"))
    assert not any(p.requires_grad for p in teacher.values())
    assert all((teacher[name] is student[name]) == (name not in trained) for name in teacher)
    assert {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]} == {
        id(student[name]) for name in trained
    }


def test_loss():
    """A window that covers the map leaves nothing to distil, and flow matching then is the teacher's own."""
    batch = make_batch()
    assert loss_of(make_task(radius=99), batch) < 1e-10
    assert loss_of(make_task(), batch) > 1e-5
    parts = [
        loss_of(make_task(flow_matching=a, prediction=b, attention=c), batch)
        for a, b, c in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1.0, 0.5, 0.5))
    ]
    torch.testing.assert_close(parts[3], parts[0] + 0.5 * parts[1] + 0.5 * parts[2])
    torch.manual_seed(0)
    noise, time = torch.randn_like(batch["latents"]), torch.randint(1, 1001, (2,)) / 1000
    task, share = make_task(), time.view(-1, 1, 1, 1)
    call = task._arguments(batch["latents"] * (1 - share) + noise * share, time, batch)
    velocity = unpack(task.transformer(**call, return_dict=False)[0], 8, 12)
    torch.testing.assert_close(parts[0], (velocity - (noise - batch["latents"])).square().mean())


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        task = make_task(down_factor=2, gradient_checkpointing=checkpointing)
        loss_of(task, make_batch()).backward()
        gradients.append([p.grad for p in task.transformer.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_training_and_what_it_saves(tmp_path):
    task = make_task(down_factor=2)
    dense = FluxTransformer2DModel(**TINY)
    dense.load_state_dict(task.teacher.state_dict())
    before, batch = loss_of(make_task(down_factor=2), make_batch()), make_batch()
    runner = trainer(tmp_path, max_epochs=10)
    runner.fit(task, TeacherLatents(height=8, width=12, count=16, text_tokens=5, steps=2, batch_size=8))
    assert loss_of(task, batch) < before

    # What changed, and nothing else, is enough for both ways of loading.
    runner.save_checkpoint(tmp_path / "task.ckpt")
    checkpoint = torch.load(tmp_path / "task.ckpt", weights_only=True)
    assert len(checkpoint["state_dict"]) == 2 * 8 + 3 * 6 + 5
    weights = load_file(tmp_path / "attn_weights.safetensors")
    assert {f"transformer.{name}" for name in weights} == set(checkpoint["state_dict"])
    call = task._arguments(batch["latents"], torch.tensor([0.3, 0.7]), batch)
    with torch.no_grad():
        expected = task.transformer(**call, return_dict=False)[0]
        resumed = make_task(down_factor=2)  # the same teacher, as its seed is
        resumed.load_state_dict(checkpoint["state_dict"], strict=False)
        assert torch.equal(resumed.transformer(**call, return_dict=False)[0], expected)
        with attach(dense, ClearAttnProcessor(2, down_factor=2)):
            load_clear_weights(dense, tmp_path / "attn_weights.safetensors")
            assert torch.equal(dense(**call, return_dict=False)[0], expected)


def test_cached_latents(tmp_path):
    batch = make_batch()
    for i in range(2):
        save_file({name: x[i].clone() for name, x in batch.items()}, tmp_path / f"{i}.safetensors")
    data = CachedLatents(str(tmp_path), batch_size=2, num_workers=0)
    runner = trainer(tmp_path / "run", max_steps=1)
    runner.fit(make_task(), data)
    assert runner.callback_metrics["train_loss"] > 0

    save_file({"latents": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(UserError, match=r"2\.safetensors has no prompt_embeds, pooled_prompt_embeds"):
        data.setup("fit"), data.train_dataloader().dataset[2]
    with pytest.raises(UserError, match=r"no \.safetensors files in"):
        CachedLatents(str(tmp_path / "none")).setup("fit")


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="either pretrained"):
        ClearDistillation()
    with pytest.raises(UserError, match=r"single-stream blocks, of which there are none"):
        ClearDistillation(config={**TINY, "num_single_layers": 0})
    with pytest.raises(UserError, match=r"height: .* must be even, got 7"):
        TeacherLatents(height=7)
    with pytest.raises(UserError, match="count: 4 latents do not fill a batch of 8"):
        TeacherLatents(count=4)
