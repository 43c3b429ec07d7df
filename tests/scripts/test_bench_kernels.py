import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def bench(repository) -> SimpleNamespace:
    """The names of bench_kernels.py."""
    path = repository / "scripts/bench_kernels.py"
    return SimpleNamespace(**runpy.run_path(str(path), run_name="bench_kernels"))


@pytest.fixture(scope="module")
def worker(repository) -> SimpleNamespace:
    """The names of time_kernels.py."""
    path = repository / "scripts/time_kernels.py"
    return SimpleNamespace(**runpy.run_path(str(path), run_name="time_kernels"))


# The H200's, so that floors can be compared with known ones.
CEILING = {"copy_gb_s": 4300.0, "matmul_tflop_s": 790.0}


def timing(us: float, method: str = "trace") -> dict:
    return {
        "device_us": us,
        "spread": 0.01,
        "call_us": us + 5,
        "calls": 10,
        "method": method,
    }


def empty() -> dict:
    return {
        "device": "NVIDIA H200",
        "machine": {"jax": "0.0", "driver": "1"},
        "method": "as the script says",
        "ceilings": CEILING,
        "rows": [],
        "failures": {},
        "peer_failures": {},
        "unavailable": {},
        "left_out": [],
        "peer": "not asked for",
        "complete": True,
    }


# --- What would run ---


def test_the_important_tasks_come_first_and_none_twice(bench):
    todo = bench.tasks(("8b", "1b"))
    assert len(todo) == len(set(todo))
    assert [t.name for t in todo[:2]] == [
        "dequantize 8b pass xla",
        "dequantize 8b pass pallas",
    ]
    assert not any(t.implementation == "fused" for t in todo if t.rows > 64)
    assert not any(t.implementation == "fused" for t in todo if t.kind != "matmul")
    for implementation in ("xla", "pallas"):
        rows = {
            t.rows
            for t in todo
            if t.kind == "matmul"
            and t.shape == (4096, 14336)
            and t.implementation == implementation
        }
        assert {1, 2, 4, 8, 16, 32, 64, 128, 2048, 8192} <= rows
    assert set(bench.tasks(("8b",), quick=True)) < set(bench.tasks(("8b",)))
    assert {t.kind for t in bench.tasks(("8b",), ("backward",))} == {"backward"}


def test_bytes_and_operations_are_those_of_the_mathematics(bench):
    task = bench.Task("matmul", "xla", (1024, 4096), 3)
    packed = 1024 * 2048 + 1024 * 64 + 4 * (256 + 256 + 1)
    assert task.bytes == packed + 2 * 3 * (1024 + 4096)
    assert task.flops == 2 * 3 * 1024 * 4096
    plain = bench.Task("dequantize", "xla", (1024, 4096), double_quant=False)
    assert plain.bytes == 1024 * 2048 + 4 * 1024 * 64 + 2 * 1024 * 4096
    assert plain.flops == 0


def test_floors_of_the_8b_are_the_known_ones(bench):
    dequantize = bench.Task("dequantize", "xla", None, model="8b")
    least = bench.row(dequantize, timing(1.0), CEILING)["floor_us"]
    assert least == pytest.approx(4084, rel=1e-3)  # 17.6 GB at 4.3 TB/s
    one = bench.Task("matmul", "xla", None, 1, model="8b")
    assert bench.row(one, timing(1.0), CEILING)["floor_us"] == pytest.approx(
        837, rel=0.01
    )
    large = bench.Task("matmul", "xla", (14336, 4096), 8192)
    found = bench.row(large, timing(2000.0), CEILING)
    assert found["floor_us"] == pytest.approx(large.flops / 790e6)
    assert found["of_floor"] == pytest.approx(found["tflop_s"] / 790)


def test_weights_in_turn_exceed_the_cache(bench):
    for task in bench.tasks(("1b", "8b", "70b")):
        request = task.request(3)
        assert request["copies"] >= 2
        if task.shape:
            assert request["copies"] * task.bytes >= bench.ROTATED_BYTES
        assert json.loads(json.dumps(request)) is not None


def test_settings_of_the_kernels_are_tried_one_by_one(bench):
    found = bench.tunable_tasks(("8b",), ("dequantize", "matmul"))
    assert {task.kind for task in found} == {"dequantize", "matmul"}
    assert len({(task.kind, task.shape, task.rows, task.tuning) for task in found}) == (
        len(found)
    )
    first = next(task for task in found if task.kind == "dequantize")
    assert first.tuning == (("words", 1), ("steps", 1))
    assert first.name.endswith("words=1 steps=1 pallas")
    assert first.request(1)["tuning"] == {"words": 1, "steps": 1}
    ways = {(task.implementation, task.rows) for task in found if task.rows}
    assert ways == {
        *(("fused", rows) for rows in bench.TUNED_ROWS),
        *(("wgmma", rows) for rows in bench.WGMMA_ROWS),
    }


def test_the_untimed_product_is_tried_with_tune_alone(bench):
    todo = bench.tasks(("8b", "1b"))
    assert not any(task.implementation == "wgmma" for task in todo)


# --- Time ---


def test_a_budget_leaves_out_what_no_longer_fits(bench):
    now = [0.0]
    budget = bench.Budget(10.0, clock=lambda: now[0])

    def work(seconds):
        now[0] += seconds
        return seconds

    assert budget.take("a", "slow", lambda: work(4)) == 4
    assert budget.take("b", "slow", lambda: work(4)) == 4
    assert budget.take("c", "slow", lambda: work(4)) is None  # 2 left, 4 needed
    assert budget.take("d", "fast", lambda: work(3)) == 3  # not known to be too long
    assert budget.take("e", "other", lambda: work(1)) is None
    assert budget.left_out == ["c", "e"]
    assert bench.Budget(None).left == float("inf")


def test_busy_time_is_the_union_of_the_events(worker):
    assert worker.busy([]) == 0
    assert worker.busy([(0, 10), (20, 5)]) == 15
    assert worker.busy([(5, 10), (0, 10), (2, 3)]) == 15
    assert worker.busy([(0, 1), (0, 1)]) == 1


def test_a_trace_is_taken_where_it_can_be_true(worker):
    now = [0.0]

    def call(i):
        now[0] += 1e-3
        return jnp.int32(i)

    def clock():
        return now[0]

    def times(seconds):
        def trace(run):
            before = now[0]
            run()
            return (now[0] - before) * seconds

        return worker.measure(call, keep=2, trace=trace, clock=clock)

    good = times(0.5)
    assert good["method"] == "trace"
    assert good["device_us"] == pytest.approx(500)
    assert good["call_us"] == pytest.approx(1000)
    assert good["calls"] == 40
    for wrong in (0.0, 40.0):  # no device events; more than the host waited for
        found = times(wrong)
        assert found["method"] == "clock"
        assert found["device_us"] == pytest.approx(1000)


def test_no_time_at_all_is_an_error(worker):
    with pytest.raises(RuntimeError, match="no time could be measured"):
        worker.measure(lambda i: None, keep=1, trace=lambda run: 0, clock=lambda: 0.0)


def test_a_trace_of_a_cpu_has_no_device_events(worker):
    assert worker.traced(lambda: jnp.ones(8).block_until_ready()) == 0


# --- What is timed, on small weights ---


@pytest.mark.parametrize(
    "kind, rows", [("dequantize", 0), ("matmul", 3), ("backward", 5)]
)
@pytest.mark.parametrize("stacked", [True, False])
def test_every_kind_runs_and_agrees_with_float32(bench, worker, kind, rows, stacked):
    task = bench.Task(kind, "xla", (64, 128), rows, stacked=stacked)
    request = task.request(1) | {"copies": 3}
    call = worker.single(request)
    want = {"dequantize": (64, 128), "matmul": (3, 64), "backward": (5, 128)}[kind]
    assert call(0).shape == want and call(0).dtype == jnp.bfloat16
    assert not (call(0) == call(1)).all()  # another weight
    assert (call(0) == call(3)).all()  # and the first again
    assert worker.mismatch(request) is None
    found = worker.answer(request, seconds=1e-4)
    assert found["timing"]["device_us"] > 0


@pytest.mark.parametrize("rows", [0, 2])
def test_a_pass_writes_the_result_of_every_projection(bench, worker, rows, monkeypatch):
    from pallas_kernels.nf4 import shapes

    small = shapes.Model("small", 64, 128, 2, 4, 2, 16)
    monkeypatch.setitem(shapes.MODELS, "small", small)
    kind = "matmul" if rows else "dequantize"
    task = bench.Task(kind, "xla", None, rows, model="small")
    request = task.request(1)
    found = worker.whole_pass(request)(0)
    assert len(found) == 7
    for seed, (projection, got) in enumerate(
        zip(small.projections, found, strict=True)
    ):
        packed = worker.random_weight(projection.shape, True, (2,), seed)
        x = worker.operand(request, projection.shape)
        want = worker.operation(request, projection.shape)(1, x, packed)  # the last
        assert jnp.allclose(got, want[:1, :64], rtol=2**-7, atol=2**-7)
    assert worker.mismatch(request) is None


def test_one_wrong_weight_is_found_and_not_timed(bench, worker, monkeypatch):
    names = worker.operation.__globals__

    def off(function, by):
        def wrong(*arguments, implementation, **named):
            out = function(*arguments, implementation="xla", **named)
            return out if implementation == "xla" else out.at[0, 0].add(by)

        return wrong

    monkeypatch.setitem(names, "nf4_dequantize", off(names["nf4_dequantize"], 0.25))
    monkeypatch.setitem(names, "nf4_matmul", off(names["nf4_matmul"], 8.0))
    request = bench.Task("dequantize", "pallas", (64, 128)).request(1)
    found = worker.answer(request | {"copies": 2})
    assert found["failed"] == "differs from xla: (64, 128): 1 of 8,192 weights differ"
    request = bench.Task("matmul", "pallas", (64, 128), 2).request(1)
    found = worker.answer(request | {"copies": 2})["failed"]
    assert "1 of 128 one-hot products differ" in found
    assert "1 of this beyond rounding" in found


def test_the_ways_of_a_product_are_told_apart(bench, worker, monkeypatch):
    names, seen = worker.operation.__globals__, []
    before = names["device"].tuned

    def spy(x, *arguments, implementation, shape, **named):
        said = names["device"].tuned("any", "nf4")
        seen.append((implementation, said["fused_rows"], said["wgmma_rows"]))
        return jnp.zeros((x.shape[0], shape[0]), x.dtype)

    monkeypatch.setitem(names, "nf4_matmul", spy)
    for one in ("xla", "pallas", "fused", "wgmma"):
        request = bench.Task("matmul", one, (64, 128), 4).request(1)
        x = worker.operand(request, (64, 128))
        worker.operation(request, (64, 128))(0, x, (None, None, None))
    assert seen == [
        ("xla", {"64x128": 0}, {}),
        ("pallas", {"64x128": 0}, {}),
        ("pallas", {"64x128": 4}, {}),
        ("pallas", {"64x128": 0}, {"64x128": [4, 4]}),
    ]
    assert names["device"].tuned is before


def test_a_refused_implementation_is_not_a_failure(bench, worker, monkeypatch):
    names = worker.operation.__globals__

    def refuse(*arguments, implementation, **named):
        raise ValueError("`nf4_matmul`: not on this device")

    monkeypatch.setitem(names, "nf4_matmul", refuse)
    request = bench.Task("matmul", "pallas", (64, 128), 2).request(1)
    assert worker.answer(request) == {"unavailable": "`nf4_matmul`: not on this device"}

    def fail(*arguments, implementation, **named):
        raise RuntimeError("launch failed")

    monkeypatch.setitem(names, "nf4_matmul", fail)
    found = worker.answer(request)
    assert found == {"failed": "RuntimeError: launch failed", "alive": True}


def test_ceilings_are_a_copy_and_a_product(worker):
    found = worker.answer(
        {"do": "ceilings"}, size=1 << 16, width=16, seconds=1e-4, traces=1
    )["ceilings"]
    assert found["copy_gb_s"] > 0 and found["matmul_tflop_s"] > 0
    assert found["copy"]["bytes"] == 2 << 16
    assert any(name.startswith("/host") for name in found["trace"])


# --- From answers to files ---


def test_answers_become_rows_failures_and_refusals(bench):
    todo = bench.tasks(("8b",), ("dequantize",), quick=True)
    answers = {
        "dequantize 8b pass xla": {"timing": timing(5000.0)},
        "dequantize 8b pass pallas": {"failed": "differs from xla: 3 weights"},
        "dequantize 4096x4096 pallas": {"unavailable": "`x`: needs a GPU\nof Hopper"},
    }
    asked = []

    def ask(request):
        found = bench.Task(
            **{
                f.name: request[f.name]
                for f in dataclasses.fields(bench.Task)
                if f.name not in ("shape", "tuning")
            },
            shape=tuple(request["shape"]) if request["shape"] else None,
        )
        asked.append(found.name)
        return answers.get(found.name, {"timing": timing(20.0)})

    result, said, saved = empty(), [], []
    bench.run_tasks(
        todo,
        ask,
        result,
        bench.Budget(None),
        say=said.append,
        save=lambda: saved.append(1),
    )
    assert asked == [t.name for t in todo] and len(saved) == len(todo)
    assert list(result["failures"]) == ["dequantize 8b pass pallas"]
    assert result["unavailable"] == {
        "`x`: needs a GPU\nof Hopper": ["dequantize 4096x4096 pallas"]
    }
    assert len(result["rows"]) == len(todo) - 2
    assert said[0] == "dequantize 8b pass xla: 5000.0 us, 82% of the ceiling"
    assert said[1].startswith("dequantize 8b pass pallas: FAILED: differs")
    # As JSON and back nothing changes.
    assert json.loads(json.dumps(result)) == result
    text = bench.table(result)
    assert (
        "| 8b, all layers |  | 8-bit | yes | xla | 5,000.0 | 3,512 |  | 82% |" in text
    )
    assert "## Failed" in text and "differs from xla: 3 weights" in text
    assert "- `x`: needs a GPU of Hopper (1 rows)" in text


def test_what_was_left_out_is_said(bench):
    result = empty() | {"complete": False}
    bench.run_tasks(
        bench.tasks(("8b",), quick=True)[:3], lambda r: {}, result, bench.Budget(0.0)
    )
    assert len(result["left_out"]) == 3 and not result["rows"]
    text = bench.table(result)
    assert "## Left out for want of time" in text and "Not complete" in text


def test_choices_follow_the_measured_times(bench):
    result = empty()

    def add(kind, shape, rows, xla, ours, **named):
        name = "fused" if kind == "matmul" and rows <= 64 else "pallas"
        for one, us in (("xla", xla), (name, ours)):
            if us is not None:
                task = bench.Task(kind, one, shape, rows, **named)
                result["rows"].append(bench.row(task, timing(us), CEILING))

    small, wide = (1024, 4096), (14336, 4096)
    for rows, xla, pallas in ((1, 9, 4), (2, 9, 5), (16, 9, 8.9), (32, 20, 9)):
        add("matmul", small, rows, xla, pallas)
    add("matmul", wide, 1, 9, 9)
    add("matmul", wide, 2, 9, 1)
    # Faster than xla, but not than dequantizing with the kernel first.
    add("matmul", (4096, 4096), 1, 9, 5)
    add("matmul", (4096, 4096), 2, 9, 6)
    task = bench.Task("matmul", "pallas", (4096, 4096), 2)
    result["rows"].append(bench.row(task, timing(5), CEILING))
    add("matmul", small, 128, 9, 1)  # many rows: not fused
    add("matmul", (64, 64), 1, 9, None)  # nothing to compare with
    add("dequantize", small, 0, 10, 9)
    add("dequantize", wide, 0, 10, 9.95)  # noise
    add("dequantize", small, 0, 1, 100, stacked=False)  # another question
    add("backward", small, 2048, 10, 1)
    task = bench.Task("dequantize", "pallas", small, tuning=(("tile", 8),))
    slow = dataclasses.replace(task, tuning=(("tile", 4),))
    result["rows"] += [
        bench.row(slow, timing(9), CEILING),
        bench.row(task, timing(3), CEILING),
    ]
    # Slower at 64 rows, faster at 128 and 256, not at 512; once more at 1,024.
    for rows, others, ours in ((64, 9, 9), (128, 9, 7), (256, 9, 8), (512, 9, 9)):
        add("matmul", (512, 512), rows, others, others)
        for columns, us in ((64, ours), (128, ours + 1)):
            tuning = (("columns", columns),)
            task = bench.Task("matmul", "wgmma", (512, 512), rows, tuning=tuning)
            result["rows"].append(bench.row(task, timing(us), CEILING))
    for name, us in (("xla", 9), ("pallas", 9), ("wgmma", 1)):
        tuning = (("columns", 64),) if name == "wgmma" else ()
        task = bench.Task("matmul", name, (512, 512), 1024, tuning=tuning)
        result["rows"].append(bench.row(task, timing(us), CEILING))
    assert bench.choices(result) == {
        "device": "NVIDIA H200",
        "jax": "0.0",
        "fused_rows": {
            "1024x4096": 2,
            "14336x4096": 0,
            "4096x4096": 1,
            "512x512": 0,
        },
        "wgmma_rows": {"512x512": [128, 256]},
        "dequantize": {"1024x4096": "pallas", "14336x4096": "xla"},
        "tuning": {"dequantize 1024x4096 0": {"tile": 8}}
        | {
            f"wgmma 512x512 {rows}": {"columns": 64}
            for rows in (64, 128, 256, 512, 1024)
        },
    }
    assert "512x512 128 to 256" in bench.table(result)
    assert "1024x4096 2, 14336x4096 0, 4096x4096 1" in bench.table(result)


# --- The processes ---

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


def test_a_lost_process_costs_one_row(bench, tmp_path, monkeypatch):
    ask = bench.Worker([sys.executable, "-c", ECHO], tmp_path / "log")
    assert ask.described == {"device": "a fake"}
    first = ask.process
    assert ask({"do": "time"}) == {"failed": "again"}
    assert ask.process is first
    assert ask({"do": "die"})["failed"] == "process ended with status 1: out of luck"
    assert ask({"do": "time"}) == {"failed": "again"}
    assert ask.process is not first
    assert ask({"do": "lose"})["alive"] is False
    assert ask.process is None
    assert ask({"do": "time"}) == {"failed": "again"}
    monkeypatch.setitem(ask.receive.__globals__, "LONGEST_ROW", 0.5)
    began = time.monotonic()
    assert "no answer within" in ask({"do": "hang"})["failed"]
    assert time.monotonic() - began < 20
    ask.close()
    assert ask.process is None


def test_the_timing_process_answers_line_by_line(bench, repository, tmp_path):
    # As it runs on a GPU, but for the question whether there is one.
    script = str(repository / "scripts/time_kernels.py")
    program = (
        f"import os, runpy\nnames = runpy.run_path({script!r})\n"
        "main = names['main']\n"
        "main.__globals__['describe'] = lambda: {'device': 'none', 'machine': {}}\n"
        "main.__globals__['ceilings'] = lambda: print('aside') or os.system('echo x')\n"
        "main()\n"
    )
    ask = bench.Worker([sys.executable, "-c", program], tmp_path / "log")
    assert ask.described == {"device": "none", "machine": {}}
    assert ask({"do": "ceilings"}) == {"ceilings": 0}
    request = bench.Task("dequantize", "xla", (64, 64)).request(1) | {"copies": 2}
    assert ask(request)["timing"]["device_us"] > 0
    ask.close()


def test_a_python_that_is_not_there_is_said(bench, tmp_path):
    ask = bench.Worker([str(tmp_path / "none")], tmp_path / "log")
    assert "No such file" in ask.described["error"]


class Fake:
    """In place of a process with a GPU: pallas takes half the time of xla."""

    def __init__(self, command, log):
        self.peer = "peer_gpu.py" in command[1]
        self.described = {"device": "Fake GPU 1", "machine": {"jax": "0.0"}}
        if self.peer:
            self.described = {"error": "ModuleNotFoundError: bitsandbytes"}

    def __call__(self, request):
        if request["do"] == "ceilings":
            return {"ceilings": CEILING}
        if request["kind"] == "backward":
            return {"failed": "differs from xla: all"}
        return {"timing": timing(50.0 if request["implementation"] == "xla" else 25.0)}

    def close(self):
        pass


def test_a_run_writes_results_table_and_choices(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.main.__globals__, "Worker", Fake)
    options = ["--output", str(tmp_path), "--tuned", str(tmp_path / "tuned")]
    options += ["--peer-python", "python-of-the-peer"]
    assert bench.main([*options, "--quick"]) == 1  # the backward pass failed
    result = json.loads((tmp_path / "kernels_fake-gpu-1.json").read_text())
    assert result["complete"] and len(result["failures"]) == 8
    assert len(result["rows"]) + 8 == len(bench.tasks(("8b",), quick=True))
    assert "bitsandbytes: was not there: ModuleNotFoundError" in capsys.readouterr().out
    text = (tmp_path / "kernels_fake-gpu-1.md").read_text()
    assert text == bench.table(result)
    tuned = json.loads((tmp_path / "tuned/fake-gpu-1.json").read_text())
    assert tuned["fused_rows"]["1024x4096"] == 16
    assert tuned["dequantize"]["4096x14336"] == "pallas"
    assert not list(tmp_path.rglob("*.tmp"))
    assert bench.main([*options, "--only", "dequantize"]) == 0


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(repository / "scripts/bench_kernels.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=repository.parent,
    )


def test_without_a_gpu_nothing_is_said_or_written(repository, tmp_path):
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    done = run(repository, "--output", str(out), "--tuned", str(tuned))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "jax finds no GPU, only cpu" in done.stderr
    assert not out.exists() and not tuned.exists()


def test_a_dry_run_needs_no_gpu(repository):
    done = run(repository, "--dry-run", "--only", "backward", "--model", "1b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "backward 2048x2048 2048 rows xla"
    assert all(line.startswith("backward ") for line in lines)


# --- On a GPU ---


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_the_time_of_its_kernels(worker):
    assert jax.devices()[0].platform == "gpu"
    found = worker.ceilings(size=256 << 20, width=4096, traces=2)
    for one in (found["copy"], found["matmul"]):
        assert one["method"] == "trace"
        assert one["device_us"] < 1.2 * one["call_us"]
    # Of any GPU this runs on: between a small card's and twice the fastest known.
    assert 100 < found["copy_gb_s"] < 16_000
    assert 5 < found["matmul_tflop_s"] < 5_000


@pytest.mark.gpu
def test_the_benchmark_runs(bench, tmp_path):
    status = bench.main(
        [
            *("--quick", "--only", "dequantize", "--model", "1b", "--budget", "60"),
            *("--output", str(tmp_path), "--tuned", str(tmp_path / "tuned")),
        ]
    )
    (file,) = tmp_path.glob("kernels_*.json")
    result = json.loads(file.read_text())
    assert result["complete"] and result["rows"], result["failures"]
    assert status == 0, result["failures"]
    for one in result["rows"]:
        assert 0 < one["of_floor"] < 1.25, one
