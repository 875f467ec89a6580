"""Certificates read back: the TSV, the table and the plot say what the record holds, and never a larger radius."""

from decimal import Decimal

import numpy as np
import pytest
from PIL import Image

from dzhpc import report
from dzhpc.errors import CheckpointError, InputError
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.certification import spread
from dzhpc.tasks.defense.smoothing import Certificate, certified_radius, confidence_interval

ABOUT = {"name": "zo", "sigma": 0.25, "n": 1000, "alpha": 0.001, "adaptive": False, "grid": 0.25}


def rows(n_as, labels=None):
    """Image k: n_as[k] of 1,000 samples for class 3, which is right unless ``labels`` says otherwise."""
    found = []
    for k, n_a in enumerate(n_as):
        radius = certified_radius(n_a, 1000, 0.25, 0.001)
        found.append(Certificate(10 * k, (labels or {}).get(k, 3), 3, n_a, 1000, radius, 1.5 * k, True))
    return found


@pytest.fixture
def record(tmp_path):
    """Twelve images: one of another class, one abstained, one at hand; the radii of the others between 0.02 and 0.62."""
    n_as = [1000, 990, 985, 980, 900, 880, 870, 860, 600, 580, 510, 1000]
    certs = [*rows(n_as, {11: 4}), Certificate(500, 3, 3, 40, 50, None, 0.1)]
    path = tmp_path / "zo.h5"
    certificates.save(path, certs[::-1], ABOUT)
    return path, certs


def test_a_record_comes_back_to_the_bit(record):
    path, certs = record
    found, about = certificates.load(path)
    assert found == certs[::-1]
    assert about == ABOUT
    assert certificates.read(path).rows == certs[:-1]  # what is not done is not counted


def test_a_damaged_record_is_refused(record):
    path, _ = record
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    with pytest.raises(CheckpointError, match="damaged"):
        certificates.read(path)


@pytest.mark.parametrize("radius", [0.0, 0.25, np.nextafter(0.25, 0), 0.1 + 0.2, 0.2499999999, 0.9999999, 1e-9, 12.3456789])
def test_a_printed_radius_is_never_larger(radius):
    for digits in (2, 4, 6):
        printed = Decimal(certificates.rounded_down(radius, digits))
        assert Decimal(radius) - Decimal(10) ** -digits < printed <= Decimal(float(radius))


def test_the_usual_columns(record):
    lines = [line.split("\t") for line in certificates.tsv(certificates.read(record[0])).splitlines()]
    assert lines[0] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert lines[1] == ["0", "3", "3", "0.615815", "1", "0:00:00"]
    assert lines[2][-1] == "0:00:01.500000"
    assert lines[11] == ["100", "3", "-1", "0.0", "0", "0:00:15"]
    assert lines[12][:3] + lines[12][4:5] == ["110", "4", "3", "0"]
    assert len(lines) == 13


def test_certified_accuracy_at_several_radii(record):
    found = certificates.read(record[0])
    radii = [row.radius for row in found.rows if row.correct]
    assert certificates.radii([found]) == [0.0, 0.25, 0.5]
    assert [found.certified(r) for r in (0.0, 0.25, 0.5)] == [10, sum(r >= 0.25 for r in radii), 1]
    assert found.certified(max(radii)) == 1
    assert found.certified(np.nextafter(max(radii), 1)) == 0
    text = certificates.table([found])
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    low, high = (100 * p for p in confidence_interval(10, 12))
    assert cells[:6] == ["zo", "0.25", "12", "1,000", "8.3 %", f"83.3 ({low:.1f}–{high:.1f})"]
    assert text.splitlines()[0].endswith("| r = 0.00 | r = 0.25 | r = 0.50 |")
    found.about["grid"] = 0.125
    assert certificates.table([found]).splitlines()[0].endswith("| r = 0.00 | r = 0.125 | r = 0.25 | r = 0.375 | r = 0.50 |")


def test_methods_are_drawn_over_each_other(record, tmp_path, monkeypatch):
    from matplotlib import pyplot

    other = tmp_path / "bare.h5"
    certificates.save(other, rows([400, 520, 1000]), ABOUT | {"name": "bare", "adaptive": True})
    kept, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    text, _ = certificates.write([record[0], other], tmp_path / "out")
    axes = kept[0].axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["zo", "bare (adaptive)"]
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([1000 / 12, 100 / 3])
    assert [line.get_ydata()[-1] for line in axes.lines] == [0, 0]
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(certified_radius(1000, 1000, 0.25, 0.001))
    close(kept[0])
    assert "| bare | 0.25 | 3 | 1,000 of 1,000 (100 %) | 66.7 % |" in text
    assert text in (tmp_path / "out" / "certified.md").read_text()
    with Image.open(tmp_path / "out" / "certified.png") as picture:
        assert picture.width > 700


def test_a_record_without_finished_images_gets_an_empty_row(tmp_path):
    certificates.save(tmp_path / "new.h5", [Certificate(0, 1)], ABOUT | {"name": "new"})
    text, _ = certificates.write([tmp_path / "new.h5"], tmp_path)
    assert "| new | 0.25 | 0 | 1,000 |  |  |" in text
    assert not (tmp_path / "certified.png").exists()
    assert report.parser().parse_args(["a.h5"]).runs[0].suffix == ".h5"


@pytest.mark.parametrize("change", [*({key: None} for key in ABOUT), {"grid": 0.0}, {"n": 0}, {"sigma": "wide"}])
def test_a_record_that_does_not_say_what_it_is_about_is_refused(tmp_path, change):
    about = {key: value for key, value in (ABOUT | change).items() if value is not None}
    certificates.save(tmp_path / "a.h5", rows([900]), about)
    with pytest.raises(CheckpointError, match=r"a\.h5: is whole, but not as dzhpc writes it"):
        certificates.write([tmp_path / "a.h5"], tmp_path)


@pytest.mark.parametrize(("images", "total"), [(None, 10_000), (50, 500), (7, 10), (1, 3), (500, 500)])
def test_the_first_images_of_a_record_are_a_fair_sample_of_a_sorted_test_set(images, total):
    order = spread(images, total)
    count = images or total
    assert sorted(order) == [k * total // count for k in range(count)]
    for first in (2, 5, 20, 100):  # between any two neighbours lie at most twice as many as there would at the best
        found = np.sort([*order[:first], total])
        assert np.diff(found).max() <= 2 * np.ceil(total / min(first, count)) + total / count


def test_more_images_than_there_are_are_refused():
    with pytest.raises(InputError, match=r"^--images 11: the test set has 10$"):
        spread(11, 10)
