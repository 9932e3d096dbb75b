"""Files that are whole or not there, and outputs that are refused before any work."""

import errno
import os

import pytest

from zoo.cli import main
from zoo.errors import UserError
from zoo.files import check_output, write_whole


@pytest.mark.parametrize("binary", [False, True])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, binary):
    def fill_the_disk(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "new" / "x"
    old, new = (b"old\n", b"new\n") if binary else ("old\n", "new\n")
    with write_whole(path, binary) as file:
        file.write(old)
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot write .*x: No space left"), write_whole(path, binary) as file:
        file.write(new)
    assert path.read_bytes() == b"old\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder.png", "is a folder, expected the name of a file"),
        ("file/x.png", "file is not a folder"),
        ("file/deep/x.png", "file is not a folder"),
        ("/proc/x.png", "cannot write /proc/x.png"),
        (f"{'x' * 300}.png", "File name too long"),
    ],
)
def test_an_output_that_cannot_be(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^--output: .*{message}"):
        check_output(output)


def test_an_output_that_can_be_leaves_nothing(tmp_path):
    check_output(tmp_path / "new" / "deep" / "x.png")
    check_output(tmp_path / "new" / "deep", folder=True)
    check_output(tmp_path, folder=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["predict", "photo.png", "--model", "nope"], "file/x.csv"),
        (["explain", "nowhere.png", "--model", "nope"], "file/x.png"),
        (["export", "nope", "--format", "torchscript"], "file/x.pt"),
        (["sample", "nowhere"], "file/x.png"),
        (["bench", "nope", "--device", "cpu"], "file"),
    ],
)
def test_commands_look_before_they_work(capsys, tmp_path, monkeypatch, command, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*command, "--output", output]) == 2  # and not because of what else is wrong
    assert capsys.readouterr().err == f"zoo: error: --output: cannot write {output}: file is not a folder\n"
