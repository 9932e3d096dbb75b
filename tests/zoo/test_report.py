"""The report of a run: one page that says what the run's own files and answers say."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch

from zoo.lightning_cli import RecipeCLI
from zoo.report import Report, _confusion, _ticks

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks nesting, and gathers tags with their attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run as a user starts it, without a recipe's loggers, and its page."""
    folder = tmp_path_factory.mktemp("report")
    args = ["fit", "--model.model_name", "test_dinat", "--model.model_args", '{"in_chans": 1}', "--data", "Digits"]
    args += ["--data.channels", "1", "--data.image_size", "32", "--data.batch_size", "16"]
    args += ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "4"]
    args += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    cli = RecipeCLI([*args, "--trainer.accelerator", "cpu"])
    return cli, folder, (folder / "lightning_logs" / "version_0" / "report.html").read_text(encoding="utf-8")


def test_loggers_by_default(run):
    _, folder, _ = run
    assert (folder / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    assert list((folder / "tensorboard").rglob("events.out.*"))


def test_nothing_is_fetched(run):
    _, _, text = run
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script|<link", text)
    assert "default-src 'none'" in text


def test_accessible(run):
    page = Page(run[2])
    assert page.all("html") == [{"lang": "en"}]
    assert "test_dinat on Digits" in page.text
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) >= 4 and all(
        chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg")
    )
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_says_what_the_run_did(run):
    cli, _, text = run
    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Report))
    assert "zoo fit --model.model_name test_dinat" in text
    assert torch.__version__.partition("+")[0] in text
    assert "class_path: zoo.data.Digits" in text  # the whole configuration
    assert "2 epochs, 4 steps, finished" in text
    assert set(report.history) == {1, 2}
    assert {"train_loss", "train_top1", "val_loss", "val_top1", "learning_rate"} <= set(report.history[2])
    assert report.history[2]["val_top1"] == pytest.approx(float(cli.trainer.callback_metrics["val_top1"]))
    assert report.counts.total() == 64
    right = sum(count for (label, answer), count in report.counts.items() if label == answer)
    assert right / 64 == pytest.approx(report.history[2]["val_top1"])
    assert f"{right} of 64 right" in text
    assert text.count('<img src="data:image/jpeg') == min(24, 64 - right) == len(report.mistakes)


def test_the_worst_mistakes_are_those_with_the_largest_loss():
    report = Report([], mistakes=3)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)
    labels[7] = -100  # no image
    for part in torch.arange(40).split(16):
        report._take({}, torch.rand(len(part), 3, 8, 9), labels[part], logits[part])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    losses[logits.argmax(1) == labels] = 0
    torch.testing.assert_close(torch.tensor([m.loss for m in report.mistakes]), losses.topk(3).values)
    assert [m.label for m in report.mistakes] == labels[losses.topk(3).indices].tolist()
    assert report.counts.total() == 39


def test_many_classes_are_pairs():
    text = _confusion(Counter({(3, 3): 6, (3, 40): 2, (7, 3): 1}), [f"<{i}>" for i in range(50)])
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text.partition("<tbody>")[2])
    assert cells == ["&lt;3&gt;", "&lt;40&gt;", "2", "25.0%", "&lt;7&gt;", "&lt;3&gt;", "1", "100.0%"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.372), (3, 3), (0, 0), (-2.5, 1e4), (1e-7, 3e-7)])
def test_ticks(low, high):
    ticks = _ticks(low, high)
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 7
    assert ticks[0] <= low and (ticks[-1] >= high or low == high)


def test_an_error_is_named(run):
    cli, folder, _ = run
    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Report))
    report.on_exception(cli.trainer, cli.model, ValueError("no <loss>"))
    text = (folder / "lightning_logs" / "version_0" / "report.html").read_text(encoding="utf-8")
    assert "ended by ValueError no &lt;loss&gt;" in text
