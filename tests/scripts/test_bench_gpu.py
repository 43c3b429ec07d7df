"""scripts/bench_gpu: its commands, times, and the processes that take them."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from scripts.bench_gpu import attention, kernels, timing, worker
from scripts.bench_gpu.results import Recorder
from tests.scripts.measured import CEILINGS, empty
from tests.scripts.measured import timing as timing_of


@pytest.mark.parametrize("command", ["kernels", "attention", "model"])
def test_without_a_gpu_nothing_is_measured_or_written(run_script, tmp_path, command):
    output = ("--output", tmp_path / "o", "--tuned", tmp_path / "t")
    options = ["decode"] if command == "model" else ["--quick", *output]
    settings = {"alone": True, "cwd": tmp_path, "JAX_PLATFORMS": "cpu"}
    done = run_script("bench_gpu", command, *options, **settings)
    assert done.returncode == 1 and done.stdout == ""
    assert f"bench_gpu {command}: jax finds no GPU" in done.stderr
    assert "only cpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "options", "first", "count"),
    [
        (kernels.main, ("--only", "backward"), "backward 2048x2048 2048 rows xla", 16),
        (attention.main, ("--quick",), "1b derivative 8192 packed pallas", 10),
    ],
)
def test_the_list_is_of_what_would_run(capsys, main, options, first, count):
    assert main(["--list", "--model", "1b", *options]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == first and len(listed) == count


@pytest.mark.parametrize("module", [kernels, attention])
def test_a_dry_run_takes_a_task_of_each_group_and_chooses_nothing(
    module, tmp_path, monkeypatch, capsys
):
    asked, commands = [], []

    class Fake:
        description = {"device": "cpu", "machine": {"jax": "0.0"}}

        def __init__(self, command, log):
            commands.append(command)

        def __call__(self, request):
            asked.append(request)
            return {"ceilings": CEILINGS, "timing": timing_of(1.0)}

        def close(self):
            pass

    monkeypatch.setattr(module, "Worker", Fake)
    options = ["--output", str(tmp_path / "o"), "--tuned", str(tmp_path / "t")]
    assert module.main(["--dry-run", "--quick", *options]) == 0
    assert commands[0][-2:] == ["--work", "--dry-run"]
    todo = kernels.tasks(("8b",), quick=True)
    if module is attention:
        todo = attention.tasks(("1b", "8b"), quick=True)
    kinds = {task.group for task in todo}
    assert len([a for a in asked if a.get("do") != "ceilings"]) == len(kinds)
    assert {path.name for path in tmp_path.iterdir()} == {"o"}
    assert len(list((tmp_path / "o").iterdir())) == 2
    # Nothing is kept without a folder.
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    assert module.main(["--dry-run"]) == 0
    assert not (tmp_path / "root").exists()


# --- timing ---


def test_busy_time_is_the_union_of_the_events():
    assert timing.busy([]) == 0
    assert timing.busy([(0, 10), (20, 5)]) == 15
    assert timing.busy([(5, 10), (0, 10), (2, 3)]) == 15
    assert timing.busy([(0, 1), (0, 1)]) == 1


@pytest.mark.parametrize(
    ("share", "method", "device_us"),
    # 0: no device events; 40: more than the host waited for.
    [(0.5, "trace", 500), (0.0, "clock", 1000), (40.0, "clock", 1000)],
)
def test_a_trace_is_taken_where_it_can_be_true(share, method, device_us):
    now = [0.0]

    def call(i):
        now[0] += 1e-3
        return jnp.int32(i)

    def trace(run):
        before = now[0]
        run()
        return (now[0] - before) * share

    row = timing.measure(call, keep=2, trace=trace, clock=lambda: now[0])
    assert row["method"] == method
    assert row["device_us"] == pytest.approx(device_us)
    assert row["call_us"] == pytest.approx(1000)
    assert row["calls"] == 40


def test_no_time_at_all_is_an_error():
    with pytest.raises(RuntimeError, match="no time could be measured"):
        timing.measure(lambda i: None, keep=1, trace=lambda _: 0, clock=lambda: 0.0)


def test_a_trace_of_a_cpu_has_no_device_events():
    assert timing.traced(lambda: jnp.ones(8).block_until_ready()) == 0


def test_ceilings_are_a_copy_and_a_product():
    row = timing.ceilings(size=1 << 16, width=16, seconds=1e-4, traces=1)
    assert row["copy_gb_s"] > 0 and row["matmul_tflop_s"] > 0
    assert row["copy"]["bytes"] == 2 << 16
    assert any(name.startswith("/host") for name in row["trace"])


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_the_time_of_its_kernels():
    assert jax.devices()[0].platform == "gpu"
    row = timing.ceilings(size=256 << 20, width=4096, traces=2)
    for part in (row["copy"], row["matmul"]):
        assert part["method"] == "trace"
        assert part["device_us"] < 1.2 * part["call_us"]
    # Of any GPU this runs on: between a small card's and twice the fastest known.
    assert 100 < row["copy_gb_s"] < 16_000
    assert 5 < row["matmul_tflop_s"] < 5_000


# --- worker ---


def test_a_budget_leaves_out_what_no_longer_fits():
    now = [0.0]
    budget = worker.Budget(10.0, clock=lambda: now[0])

    def work(seconds):
        now[0] += seconds
        return seconds

    assert budget.take("a", "slow", lambda: work(4)) == 4
    assert budget.take("b", "slow", lambda: work(4)) == 4
    assert budget.take("c", "slow", lambda: work(4)) is None  # 2 left, 4 needed
    assert budget.take("d", "fast", lambda: work(3)) == 3  # not known to be too long
    assert budget.take("e", "other", lambda: work(1)) is None
    assert budget.left_out == ["c", "e"]
    assert worker.Budget(None).left == float("inf")


ECHO = """
import json, sys, time
print(json.dumps({"device": "a fake"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit("out of luck")
    if request["do"] == "hang":
        time.sleep(60)
    lost = {"alive": False} if request["do"] == "lose" else {}
    print(json.dumps({"failed": "again"} | lost), flush=True)
"""


def test_a_lost_process_costs_one_answer(tmp_path, monkeypatch):
    ask = worker.Worker([sys.executable, "-c", ECHO], tmp_path / "log")
    assert ask.description == {"device": "a fake"}
    first = ask.process
    assert ask({"do": "time"}) == {"failed": "again"}
    assert ask.process is first
    assert ask({"do": "die"})["failed"] == "process ended with status 1: out of luck"
    assert ask({"do": "time"}) == {"failed": "again"}
    assert ask.process is not first
    assert ask({"do": "lose"})["alive"] is False
    assert ask.process is None
    assert ask({"do": "time"}) == {"failed": "again"}
    monkeypatch.setattr(worker, "LONGEST_ROW", 0.5)
    began = time.monotonic()
    assert "no answer within" in ask({"do": "hang"})["failed"]
    assert time.monotonic() - began < 20
    ask.close()
    assert ask.process is None


def test_a_missing_python_is_reported(tmp_path):
    ask = worker.Worker([str(tmp_path / "none")], tmp_path / "log")
    assert "No such file" in ask.description["error"]


def test_the_timing_process_answers_line_by_line(tmp_path):
    # As it runs on a GPU, but for the check that there is one.
    program = (
        "import os\n"
        "from scripts.bench_gpu import nf4_operations, timing\n"
        "timing.describe = lambda any_device: {'device': 'none', 'machine': {}}\n"
        "nf4_operations.ceilings = lambda: print('aside') or os.system('echo x')\n"
        "timing.serve(nf4_operations.answer)\n"
    )
    ask = worker.Worker([sys.executable, "-c", program], tmp_path / "log")
    assert ask.description == {"device": "none", "machine": {}}
    assert ask({"do": "ceilings"}) == {"ceilings": 0}
    task = kernels.Task("dequantize", "xla", (64, 64))
    assert ask(task.request(1) | {"copies": 2})["timing"]["device_us"] > 0
    ask.close()


# --- results ---


@pytest.mark.parametrize("script", [kernels, attention])
def test_what_was_left_out_is_listed(script):
    todo = script.tasks(("8b",), quick=True)[:3]
    result = empty() | {"complete": False}
    Recorder(result, worker.Budget(0.0)).run(todo, lambda request: {})
    assert result["left_out"] == [task.name for task in todo]
    assert result["rows"] == []
    text = script.table(json.loads(json.dumps(result)))
    assert "## Left out for want of time" in text and "Not complete" in text
    assert not any(v for v in script.choices(result).values() if isinstance(v, dict))
