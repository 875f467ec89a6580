"""Many steps: neither memory nor the time of a step grows with their number; and every change of the rank count."""

import time
from pathlib import Path

import numpy as np
from mpi_launch import Case, assert_same, batch, bits, column, mpirun, sets

STEPS = 2000
SHORT_STEPS = sets(  # two active coordinates in three layers, so that a step takes milliseconds
    model__depth=1, zo__engine="reuse", sparsity__ratio=0.98, sparsity__prune="all", data__batch_size=32, eval__batch_size=360,
    stop__epochs=STEPS, stop__steps=STEPS, eval__every_epochs=5, checkpoint__every_steps=50,
)  # fmt: skip


def resident(pid: int) -> int:
    """Bytes of real memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_memory_and_time_do_not_grow_with_the_number_of_steps(place):
    samples: list[tuple[int, int]] = []
    log = place / "long-run" / "log.txt"

    def meanwhile(process) -> None:
        while process.poll() is None:
            children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            newest = max((p.stat().st_mtime for p in (place / "long-run" / "checkpoints").glob("*.h5")), default=0)
            if log.exists() and newest and children:
                step = max(int(p.stem[5:]) for p in (place / "long-run" / "checkpoints").glob("*.h5"))
                try:
                    samples.append((step, resident(children[0])))
                except OSError:  # it has just ended
                    break
            time.sleep(0.2)

    mpirun(
        2, "train", "digits.toml", "--run-dir", "long-run", *SHORT_STEPS, cwd=place, timeout=300, meanwhile=meanwhile
    ).succeeded()
    seconds = np.array(column(place / "long-run", "train/step_s"))
    assert len(seconds) == STEPS
    early = np.median([size for step, size in samples if STEPS // 10 <= step < STEPS // 4])
    late = np.median([size for step, size in samples if STEPS * 9 // 10 <= step < STEPS])
    print(f"resident {early / 2**20:.1f} -> {late / 2**20:.1f} MiB; a step {1e3 * np.median(seconds):.2f} ms")
    assert 0.95 < late / early < 1.05
    assert np.median(seconds[-STEPS // 4 :]) < 1.5 * np.median(seconds[STEPS // 10 : STEPS // 4])


def test_a_run_stopped_at_four_ranks_continues_on_any_number(place):
    start = lambda n: Case(f"half-{n}", "train", ["digits.toml", "--run-dir", f"from-4-{n}", *sets(stop__steps=5)])  # noqa: E731
    four = batch(4, place, [start(n) for n in (1, 2, 3)])
    assert [result.code for result in four.values()] == [0, 0, 0]
    for ranks in (1, 2, 3):
        whole = [Case("whole", "train", ["digits.toml", "--run-dir", "elastic-whole"])] if ranks == 1 else []
        cases = [Case(f"rest-{ranks}", "train", ["digits.toml", "--run-dir", f"from-4-{ranks}"]), *whole]
        assert batch(ranks, place, cases)[f"rest-{ranks}"].succeeded().out.startswith("restarting at step 5 ")
        assert_same(bits(place / "elastic-whole", but=("config",)), bits(place / f"from-4-{ranks}", but=("config",)))
