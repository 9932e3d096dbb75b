"""`zoo export`, on models of one block. scripts/check_export.py measures every family and format."""

import json
import warnings

import onnxruntime
import pytest
import timm
import torch

from families import small
from zoo import export
from zoo.cli import main
from zoo.errors import UserError
from zoo.lowering import written_out

TINY = dict(depths=(1,), num_heads=(2,), dilations=((2,),), embed_dim=16, num_classes=4)


def make_model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_dinat", **TINY).eval()


def images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(model, x):
    with torch.inference_mode():
        return model(x)


def assert_like_model(actual, model, x):
    torch.testing.assert_close(torch.as_tensor(actual), run(model, x), rtol=1e-4, atol=1e-5)


def test_onnx_of_any_batch_and_size(tmp_path):
    model, path = make_model(), tmp_path / "new" / "model.onnx"
    checked = export.export("test_dinat", model, "onnx", path, 32, dynamic_size=True)
    assert checked.difference < 1e-5
    assert len({shape[0] for shape in checked.shapes}) > 1 and len({shape[2:] for shape in checked.shapes}) > 2
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_modelmeta().custom_metadata_map["model"] == "test_dinat"
    for shape in ((1, 4, 4), (2, 20, 72), (5, 64, 8)):  # less than a window, more than one, a window high
        x = images(*shape)
        assert_like_model(session.run(None, {"images": x.numpy()})[0], model, x)
    with pytest.raises(Exception, match="reshape"):  # not a wrong answer
        session.run(None, {"images": images(1, 34, 32).numpy()})


def test_torch_export_of_any_batch(tmp_path):
    model, path = make_model(), tmp_path / "model.pt2"
    export.export("test_dinat", model, "torch-export", path, 40)
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "zoo" in str(node.target)]  # loads where we are not
    for batch in (1, 2, 5):
        x = images(batch, 40, 40)
        assert_like_model(program.module()(x), model, x)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("halonet_h0_256", dict(depths=(1,), num_heads=(2,))),
        ("biformer_tiny", dict(depths=(1,), num_heads=(2,), topks=(2,))),
    ],
)
def test_trace_of_any_size(name, kwargs):
    model = small(name, **kwargs)
    module = export.trace(model, torch.zeros(1, 3, 32, 32), 4).module()
    for shape in ((1, 4, 4), (3, 24, 52)):
        x = images(*shape)
        assert_like_model(module(x), model, x)


def save_checkpoint(path, model):
    state_dict = {f"model.{name}": value for name, value in model.state_dict().items()}
    hyper_parameters = {"model_name": "test_dinat", "num_classes": 4, "lr": 1e-3}
    hyper_parameters["model_args"] = {k: v for k, v in TINY.items() if k != "num_classes"}
    torch.save(
        {"pytorch-lightning_version": "2.6.6", "state_dict": state_dict, "hyper_parameters": hyper_parameters}, path
    )


def test_command_on_a_checkpoint(tmp_path, capsys):
    model, checkpoint, path = make_model(seed=3), tmp_path / "best.ckpt", tmp_path / "model.pt"
    save_checkpoint(checkpoint, model)
    arguments = ["--format", "torchscript", "--output", str(path), "--image-size", "32"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["export", str(checkpoint), *arguments]) == 0
    said = capsys.readouterr().out
    assert f"{path}: test_dinat as torchscript" in said and "random weights" not in said
    files = {"zoo.json": ""}
    scripted = torch.jit.load(path, _extra_files=files)
    assert json.loads(files["zoo.json"])["model"] == "test_dinat"
    x = images(2, 33, 50)
    assert_like_model(run(scripted, x), model, x)

    assert main(["export", str(checkpoint), *arguments, "--pretrained"]) == 2
    assert "is a checkpoint and has weights" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_text("the last good one")
    suffix, write, load = export._FORMATS["torchscript"]

    def write_another(_, *arguments):
        write(make_model(seed=1), *arguments)

    monkeypatch.setitem(export._FORMATS, "torchscript", (suffix, write_another, load))
    with pytest.raises(UserError, match=r"was not written: .* computes something else"):
        export.export("test_dinat", make_model(), "torchscript", path, 32)
    assert path.read_text() == "the last good one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fill_the_disk(model, path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export._FORMATS, "torchscript", (".pt", fill_the_disk, torch.jit.load))
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        export.export("test_dinat", make_model(), "torchscript", tmp_path / "model.pt", 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", "torch-export"])
def test_torch_does_not_write_itself(tmp_path, monkeypatch, format):
    """Its writer of files ends the process when the disk is full."""

    def fill_the_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Path, "write_bytes", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot write .*model: No space left on device"):
        export.export("test_dinat", make_model(), format, tmp_path / "model", 32)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(tmp_path, monkeypatch, capsys):
    def error(*arguments, output="x.onnx"):
        assert main(["export", *arguments, "--output", str(tmp_path / output)]) == 2
        return capsys.readouterr().err

    assert "is a folder" in error("test_dinat", "--format", "onnx", output="")
    assert "there is no file none.ckpt" in error("none.ckpt", "--format", "onnx")
    assert "did you mean" in error("dinat_tinny", "--format", "onnx")
    sizes = ("--image-size", "33", "--dynamic-size")
    assert "--image-size: expected a multiple of 32" in error("test_dinat", "--format", "onnx", *sizes)
    assert "depend on the size of the images" in error("biformer_stl_nchw", "--format", "onnx", "--dynamic-size")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    assert "needs onnxscript: `pip install 'attn-zoo[export]'`" in error("test_dinat", "--format", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_operators_that_are_not_written_out_say_so():
    from zoo.kernels import neighborhood_attention_2d

    x = torch.zeros(1, 8, 8, 1, 4)
    with written_out(), pytest.raises(NotImplementedError, match="causal"):
        neighborhood_attention_2d(x, x, x, 3, is_causal=True)
