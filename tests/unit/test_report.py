"""Reports: the numbers of the table are those of the metrics, and several runs lie over one another in one picture."""

import re

import numpy as np
import pytest
from PIL import Image

from dzhpc import report
from dzhpc.errors import InputError
from dzhpc.files import curves
from dzhpc.files.metrics import Metrics
from dzhpc.job.world import World


def make_run(folder, steps, accuracy, loss=lambda step: 2 / step):
    folder.mkdir()
    metrics = Metrics(folder / "metrics.h5")
    for step in range(1, steps + 1):
        metrics.add_train(step, step / 10, loss(step), 0.1, 1.0, 100 * step, 36.0, 0.0, 0)
        if step % 10 == 0:
            metrics.add_eval(step, step / 10, loss(step) / 2, accuracy * step / steps if step < steps else accuracy - 0.01)
    metrics.flush()
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "cge", 40, 0.95), make_run(tmp_path / "rge", 200, 0.90)]


def test_the_table_has_a_row_of_final_numbers_for_each_run(runs, tmp_path):
    text, _ = curves.write(runs, tmp_path / "out")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    tail = np.mean([2 / step for step in range(37, 41)])
    assert rows[0] == ["run", "steps", "epochs", "queries", "train loss", "test loss", "test accuracy", "best", "wall time"]
    assert rows[2] == ["cge", "40", "4.00", "4,000", f"{tail:.4g}", "0.025", "94.00 %", "94.00 %", "0:24:00"]
    assert rows[3][:4] + rows[3][5:] == ["rge", "200", "20.00", "20,000", "0.005", "89.00 %", "89.00 %", "2:00:00"]
    assert text in (tmp_path / "out" / "report.md").read_text()
    assert "](curves.png)" in (tmp_path / "out" / "report.md").read_text()


def test_the_best_accuracy_may_lie_before_the_last(tmp_path):
    run = curves.read(make_run(tmp_path / "a", 40, 0.5))
    run.eval["accuracy"][1] = 0.8
    assert "| 49.00 % | 80.00 % |" in curves.table([run])


def test_both_runs_are_drawn_over_each_other_against_epochs_queries_and_wall_time(runs, tmp_path, monkeypatch):
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    curves.write(runs, tmp_path / "out")
    axes = kept[0].axes
    assert [a.get_xlabel() for a in axes[:3]] == ["epoch", "queries", "wall time in minutes"]
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["cge", "rge"]
    for axis, ends in zip(axes[3:], [(4, 20), (4000, 20_000), (24, 120)], strict=True):
        assert [line.get_xdata()[-1] for line in axis.lines] == pytest.approx(ends)
        assert [line.get_ydata()[-1] for line in axis.lines] == pytest.approx([94, 89])
    close(kept[0])
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").resize((400, 200)).getcolors(10**6)) > 20


def test_a_run_without_accuracy_or_with_negative_losses_is_drawn_too(tmp_path):
    folder = make_run(tmp_path / "own", 30, np.nan, loss=lambda step: -float(step))
    text, _ = curves.write([folder], tmp_path / "out")
    assert "| own | 30 | 3.00 | 3,000 | -29 | -15 |  |  | 0:18:00 |" in text
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.height < 600  # one row of plots


def test_a_run_that_has_not_trained_yet_gets_a_row_and_no_curve(tmp_path, runs):
    (tmp_path / "new").mkdir()
    Metrics(tmp_path / "new" / "metrics.h5").flush()
    assert "| new | 0 |" in curves.write([tmp_path / "new", runs[0]], tmp_path / "out")[0]
    assert curves.write([tmp_path / "new"], tmp_path / "alone")[0].endswith("| new | 0 | | | | | | | |")
    assert not (tmp_path / "alone" / "curves.png").exists()


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: no metrics.h5; expected a run folder"):
        curves.write([tmp_path], tmp_path / "out")


NAMES = ["$USER_$SLURM_JOB_ID", "_hidden", "a^b\\$c|d", "10%{x}", "größe-σ-模型"]


def test_any_name_is_drawn_as_it_is_and_breaks_no_table(tmp_path, monkeypatch, recwarn):
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    monkeypatch.setitem(pyplot.rcParams, "text.usetex", True)
    text, files = curves.write([make_run(tmp_path / name, 20, 0.9) for name in NAMES], tmp_path / "out")
    assert [path.name for path in files] == ["report.md", "curves.png"]
    shown = [label.get_text() for label in kept[0].axes[0].get_legend().get_texts()]
    assert [label.replace("\\$", "$").strip() for label in shown] == NAMES
    close(kept[0])
    assert len(recwarn) == 0
    assert {len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines()} == {11}


def test_a_figure_that_fails_costs_the_figure(runs, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(curves, "plot", lambda *_: [][0])
    with caplog.at_level("WARNING", "dzhpc"):
        _, files = curves.write(runs, tmp_path / "out")
    assert [path.name for path in files] == ["report.md"]
    assert "no figure: IndexError" in caplog.text


def test_a_report_of_ones_own_is_not_written_over(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("# my thesis")
    for _ in range(2):
        _, files = curves.write(runs, out)
        assert [path.name for path in files] == ["report-dzhpc.md", "curves-dzhpc.png"]
    assert (out / "report.md").read_text() == "# my thesis" and not (out / "curves.png").exists()
    assert "](curves-dzhpc.png)" in (out / "report-dzhpc.md").read_text()


@pytest.mark.parametrize("words", [["--campaign", "runs"], ["a.h5"], ["a.json"]])
def test_against_is_for_runs_alone(words):
    with pytest.raises(InputError, match="--against: compares run folders"):
        report.main(World(alone=True), report.parser().parse_args([*words, "--against", "queries"]))


def test_against_queries_the_first_run_is_the_measure(runs, tmp_path):
    """cge ends at 94 % after 4,000 queries; rge never comes there, and cge itself does at the evaluation of its end."""
    text, files = curves.write(runs, tmp_path / "out", "queries")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["run", "queries", "accuracy at the end", "best", "queries to 94.00 %", "of those of cge"]
    assert rows[2] == ["cge", "4,000", "94.00 %", "94.00 %", "4,000", "1.000"]
    assert rows[3] == ["rge", "20,000", "89.00 %", "89.00 %", "never", ""]
    text, _ = curves.write(runs[::-1], tmp_path / "back", "queries")
    assert "| cge | 4,000 | 94.00 % | 94.00 % | 4,000 | 0.200 |" in text
    assert [file.name for file in files] == ["report.md", "curves.png"]
