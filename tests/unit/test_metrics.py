"""The record of a run: its rows come back, and those that a restart must not find are gone."""

from dzhpc.files.metrics import Metrics, load_metrics


def test_metrics_come_back_and_lose_the_rows_after_a_restored_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.h5")
    for step in range(1, 9):
        metrics.add_train(step, step / 4, 1 / step, 0.1, 0.5, 2**40 + step, 0.01, 0.001, 10**9)
        if step % 2 == 0:
            metrics.add_eval(step, step / 4, 2 / step, step / 10)
        if step == 5:
            metrics.flush()
    metrics.flush()
    train, evaluation = load_metrics(tmp_path / "metrics.h5")
    assert train[:, 0].tolist() == list(range(1, 9))
    assert train[-1].tolist() == [8, 2, 0.125, 0.1, 0.5, 2**40 + 8, 0.01, 0.001, 10**9]
    assert evaluation[:, 3].tolist() == [0.2, 0.4, 0.6, 0.8]

    again = Metrics(tmp_path / "metrics.h5")
    again.restore(6, keep_eval=lambda step: step % 4 == 0)
    again.add_train(7, *[0.0] * 8)
    again.flush()
    train, evaluation = load_metrics(tmp_path / "metrics.h5")
    assert train[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert evaluation[:, 0].tolist() == [4]


def test_a_record_that_cannot_be_read_is_kept_under_another_name(tmp_path, caplog):
    for k, spoil in enumerate((lambda path: path.write_bytes(b"cut"), lambda path: path.mkdir())):
        spoil(tmp_path / "metrics.h5")
        metrics = Metrics(tmp_path / "metrics.h5")
        assert not metrics.restore(6, keep_eval=lambda step: True)
        assert (tmp_path / "metrics-damaged.h5").exists() and "metrics-damaged.h5" in caplog.text
        metrics.add_train(7, *[0.0] * 8)
        metrics.flush()
        assert len(load_metrics(tmp_path / "metrics.h5")[0]) == 1
        (tmp_path / "metrics.h5").unlink(), (tmp_path / "metrics-damaged.h5").rename(tmp_path / f"seen-{k}")


def test_a_record_of_another_run_is_kept_and_not_gone_on_with(tmp_path, caplog):
    for run in ("", "a", "b"):  # earlier versions did not say whose it is
        Metrics(tmp_path / "metrics.h5", run).flush()
        ours = Metrics(tmp_path / "metrics.h5", "a")
        ours.restore(6, keep_eval=lambda step: True)
        assert (tmp_path / "metrics.h5").exists() == (run != "b") and (tmp_path / "metrics-foreign.h5").exists() == (run == "b")
    assert "the record of steps before 6 is lost" in caplog.text and "is the record of another run; kept as" in caplog.text
