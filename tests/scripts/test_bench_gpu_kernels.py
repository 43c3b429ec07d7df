import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels.nf4 import shapes
from scripts.bench_gpu import gated_operations, norm_operations
from scripts.bench_gpu import kernels as bench
from scripts.bench_gpu import nf4_operations as operations
from scripts.bench_gpu.results import Recorder
from scripts.bench_gpu.worker import Budget
from tests.scripts.measured import CEILINGS, empty, timing

NORMS = norm_operations.KINDS


def row(task: bench.Task, us: float) -> dict:
    return task.row(timing(us), {"ceilings": CEILINGS})


# --- What would run ---


def test_the_important_tasks_come_first_and_none_twice():
    todo = bench.tasks(("8b", "1b"))
    assert len(todo) == len(set(todo))
    names = ["dequantize 8b pass xla", "dequantize 8b pass pallas"]
    assert [task.name for task in todo[:2]] == names
    fused = [task for task in todo if task.implementation == "fused"]
    assert fused and all(t.rows <= 64 and t.kind == "matmul" for t in fused)
    for implementation in ("xla", "pallas"):
        case = ("matmul", (4096, 14336), implementation)
        rows = {t.rows for t in todo if (t.kind, t.shape, t.implementation) == case}
        assert {1, 2, 4, 8, 16, 32, 64, 128, 2048, 8192} <= rows
    assert set(bench.tasks(("8b",), quick=True)) < set(bench.tasks(("8b",)))
    assert {t.kind for t in bench.tasks(("8b",), ("backward",))} == {"backward"}
    # With `--tune` only.
    assert not any(task.implementation == "wgmma" for task in todo)


def test_bytes_and_operations_are_those_of_the_mathematics():
    task = bench.Task("matmul", "xla", (1024, 4096), 3)
    packed = 1024 * 2048 + 1024 * 64 + 4 * (256 + 256 + 1)
    assert task.bytes == packed + 2 * 3 * (1024 + 4096)
    assert task.flops == 2 * 3 * 1024 * 4096
    plain = bench.Task("dequantize", "xla", (1024, 4096), double_quant=False)
    assert plain.bytes == 1024 * 2048 + 4 * 1024 * 64 + 2 * 1024 * 4096
    assert plain.flops == 0


def test_floors_of_the_8b_are_the_known_ones():
    def floor(kind, rows):
        return row(bench.Task(kind, "xla", None, rows, model="8b"), 1.0)["floor_us"]

    assert floor("dequantize", 0) == pytest.approx(4084, rel=1e-3)  # 17.6 GB
    assert floor("matmul", 1) == pytest.approx(837, rel=0.01)


def test_the_floor_of_a_large_product_is_that_of_its_operations():
    task = bench.Task("matmul", "xla", (14336, 4096), 8192)
    large = row(task, 2000.0)
    assert large["floor_us"] == pytest.approx(task.flops / 790e6)
    assert large["of_floor"] == pytest.approx(large["tflop_s"] / 790)


def test_weights_in_turn_exceed_the_cache():
    for task in bench.tasks(("1b", "8b", "70b")):
        request = task.request(3)
        assert request["copies"] >= 2
        if task.shape:
            assert request["copies"] * task.bytes >= bench.ROTATED_BYTES
        assert json.loads(json.dumps(request)) is not None


def test_settings_of_the_kernels_are_tried_one_by_one():
    todo = bench.tunable_tasks(("8b",), ("dequantize", "matmul"))
    assert {task.kind for task in todo} == {"dequantize", "matmul"}
    settings = {(task.kind, task.shape, task.rows, task.tuning) for task in todo}
    assert len(settings) == len(todo)
    first = next(task for task in todo if task.kind == "dequantize")
    assert first.tuning == (("words", 1), ("steps", 1))
    assert first.name.endswith("words=1 steps=1 pallas")
    assert first.request(1)["tuning"] == {"words": 1, "steps": 1}
    ways = {(task.implementation, task.rows) for task in todo if task.rows}
    fused = {("fused", rows) for rows in bench.TUNED_ROWS}
    assert ways == fused | {("wgmma", rows) for rows in bench.WGMMA_ROWS}


def test_a_norm_reads_and_writes_each_array_once():
    forward, backward = (bench.Task(kind, "xla", (48, 4096), 8192) for kind in NORMS)
    # 31 and 47 us of 4.3 TB/s for the norm alone, forward and backward.
    assert forward.bytes / 4.3e6 == pytest.approx(31.4, rel=0.02)
    assert backward.bytes / 4.3e6 == pytest.approx(63.1, rel=0.02)
    assert forward.flops == backward.flops == 2 * 8192 * 48 * 4096
    names = [task.name for task in bench.tasks(("8b",), NORMS, quick=True)]
    assert names[:2] == [
        "norm 48x4096 8192 rows xla",
        "norm 48x4096 8192 rows pallas",
    ]
    assert len(names) == 4


# --- What is timed, on small weights ---


GATED = gated_operations.KINDS


def test_an_activation_reads_and_writes_each_array_once():
    forward, backward = (bench.Task(kind, "xla", (16, 14336), 8192) for kind in GATED)
    # 164 and 274 us of 4.3 TB/s for the activation alone, forward and backward.
    assert forward.bytes / 4.3e6 == pytest.approx(164, rel=0.01)
    assert backward.bytes / 4.3e6 == pytest.approx(274, rel=0.01)
    assert 3 * forward.flops == backward.flops == 6 * 8192 * 16 * 14336
    names = [task.name for task in bench.tasks(("8b",), GATED, quick=True)]
    assert names[0] == "gated 16x14336 8192 rows xla" and len(names) == 4


@pytest.mark.parametrize("kind", GATED)
def test_an_activation_runs_and_its_errors_are_found(kind, monkeypatch):
    request = bench.Task(kind, "xla", (16, 128), 64).request(1) | {"copies": 2}
    assert operations.answer(request, seconds=1e-4)["timing"]["device_us"] > 0
    results = {"gated": "gated_activation", "gated_backward": "gated_gradients"}
    right = getattr(gated_operations, results[kind])

    def wrong(*arguments, implementation):
        first, second = right(*arguments, implementation="xla")
        return (first if implementation == "xla" else first.at[3, 5].add(1.0)), second

    monkeypatch.setattr(gated_operations, results[kind], wrong)
    assert gated_operations.mismatch(request) is None
    failed = operations.answer(request | {"implementation": "pallas"})["failed"]
    assert failed.startswith("differs from xla: result 0 by ")


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_runs_and_agrees_with_float32(kind):
    request = bench.Task(kind, "xla", (16, 256), 8).request(1) | {"copies": 3}
    call = norm_operations.weight_call(request)
    width = 256 + 16 * (kind == "norm")
    assert call(0).shape == (8, width) and call(0).dtype == jnp.bfloat16
    assert not (call(0) == call(1)).all() and (call(0) == call(3)).all()
    assert norm_operations.mismatch(request) is None
    assert operations.answer(request, seconds=1e-4)["timing"]["device_us"] > 0


def test_an_error_of_a_norm_is_found(monkeypatch):
    right = norm_operations.normed_input

    def wrong(x, *arguments, implementation, **options):
        ext, x = right(x, *arguments, implementation="xla", **options)
        return (ext if implementation == "xla" else ext.at[3, 5].add(1.0)), x

    monkeypatch.setattr(norm_operations, "normed_input", wrong)
    request = bench.Task("norm", "pallas", (16, 256), 8).request(1)
    failed = operations.answer(request)["failed"]
    assert failed.startswith("differs from xla: output by 1")


def test_a_dry_run_is_small_and_checks_every_kind():
    requests = [bench.Task("norm", "pallas", (48, 4096), 8192).request(3)]
    requests.append(bench.Task("matmul", "fused", (4096, 14336), 16).request(3))
    requests.append(bench.Task("matmul", "fused", None, 1, model="8b").request(3))
    for request in requests:
        small = operations.narrowed(request)
        assert small["shape"] in ((16, 256), (128, 256), None)
        assert small["rows"] <= 64 and small["copies"] == 2
        if request["kind"] == "norm":
            assert operations.answer(request, dry_run=True).keys() == {"timing"}
    assert operations.projections_of(small) == operations.NARROW.projections


@pytest.mark.parametrize(
    ("kind", "rows", "shape"),
    [("dequantize", 0, (64, 128)), ("matmul", 3, (3, 64)), ("backward", 5, (5, 128))],
)
@pytest.mark.parametrize("stacked", [True, False])
def test_every_kind_runs_and_agrees_with_float32(kind, rows, shape, stacked):
    task = bench.Task(kind, "xla", (64, 128), rows, stacked=stacked)
    request = task.request(1) | {"copies": 3}
    call = operations.weight_call(request)
    assert call(0).shape == shape and call(0).dtype == jnp.bfloat16
    assert not (call(0) == call(1)).all()  # another weight
    assert (call(0) == call(3)).all()  # and the first again
    assert operations.mismatch(request) is None
    answer = operations.answer(request, seconds=1e-4)
    assert answer["timing"]["device_us"] > 0


@pytest.mark.parametrize(("kind", "rows"), [("dequantize", 0), ("matmul", 2)])
def test_a_pass_writes_the_result_of_every_projection(kind, rows, monkeypatch):
    small = shapes.Model("small", 64, 128, 2, 4, 2, 16)
    monkeypatch.setitem(shapes.MODELS, "small", small)
    request = bench.Task(kind, "xla", None, rows, model="small").request(1)
    results = operations.model_call(request)(0)
    assert len(results) == 7
    pairs = zip(small.projections, results, strict=True)
    for seed, (projection, got) in enumerate(pairs):
        packed = operations.random_weight(projection.shape, True, (2,), seed)
        x = operations.make_operand(request, projection.shape)
        run = operations.operation(request, projection.shape)
        want = run(1, x, packed)[:1, :64]  # of the last layer
        assert jnp.allclose(got, want, rtol=2**-7, atol=2**-7)
    assert operations.mismatch(request) is None


ONE_HOT = ("1 of 128 one-hot products differ", "1 of this beyond rounding")


@pytest.mark.parametrize(
    ("kind", "rows", "error", "messages"),
    [
        ("dequantize", 0, 0.25, ["1 of 8,192 weights differ"]),
        ("matmul", 2, 8.0, ONE_HOT),
    ],
)
def test_an_error_is_found_and_not_timed(kind, rows, error, messages, monkeypatch):
    function = f"nf4_{kind}"
    right = getattr(operations, function)

    def wrong(*arguments, implementation, **options):
        out = right(*arguments, implementation="xla", **options)
        return out if implementation == "xla" else out.at[0, 0].add(error)

    monkeypatch.setattr(operations, function, wrong)
    request = bench.Task(kind, "pallas", (64, 128), rows).request(1) | {"copies": 2}
    failed = "; ".join(f"(64, 128): {message}" for message in messages)
    answer = {"failed": f"differs from xla: {failed}"}
    assert operations.answer(request) == answer


@pytest.mark.parametrize(
    ("implementation", "called", "fused_rows", "wgmma_rows"),
    [
        ("xla", "xla", 0, {}),
        ("pallas", "pallas", 0, {}),
        ("fused", "pallas", 4, {}),
        ("wgmma", "pallas", 0, {"64x128": [4, 4]}),
    ],
)
def test_the_ways_to_multiply_are_chosen_one_by_one(
    implementation, called, fused_rows, wgmma_rows, monkeypatch
):
    calls = []
    before = operations.device.tuned

    def spy(x, *arguments, implementation, shape, **options):
        calls.append((implementation, operations.device.tuned("any", "nf4")))
        return jnp.zeros((x.shape[0], shape[0]), x.dtype)

    monkeypatch.setattr(operations, "nf4_matmul", spy)
    request = bench.Task("matmul", implementation, (64, 128), 4).request(1)
    x = operations.make_operand(request, (64, 128))
    operations.operation(request, (64, 128))(0, x, (None, None, None))
    ((name, choices),) = calls
    assert name == called
    assert choices["fused_rows"] == {"64x128": fused_rows}
    assert choices["wgmma_rows"] == wgmma_rows
    assert operations.device.tuned is before


def test_a_refused_implementation_is_not_a_failure(monkeypatch):
    def answer(error):
        def fail(*arguments, **options):
            raise error

        monkeypatch.setattr(operations, "nf4_matmul", fail)
        task = bench.Task("matmul", "pallas", (64, 128), 2)
        return operations.answer(task.request(1))

    assert answer(ValueError("not here")) == {"unavailable": "not here"}
    failed = {"failed": "RuntimeError: launch failed", "alive": True}
    assert answer(RuntimeError("launch failed")) == failed


# --- From answers to files ---


def test_answers_become_rows_failures_and_refusals():
    todo = bench.tasks(("8b",), ("dequantize",), quick=True)
    answers = {
        "dequantize 8b pass xla": {"timing": timing(5000.0)},
        "dequantize 8b pass pallas": {"failed": "differs from xla: 3 weights"},
        "dequantize 4096x4096 pallas": {"unavailable": "`x`: needs a GPU\nof Hopper"},
    }
    fields = {field.name for field in dataclasses.fields(bench.Task)}
    requested = []

    def ask(request):
        values = {k: v for k, v in request.items() if k in fields - {"tuning"}}
        requested.append(bench.Task(**values).name)
        return answers.get(requested[-1], {"timing": timing(20.0)})

    result, printed, saved = empty(), [], []
    save, say = lambda: saved.append(1), printed.append
    Recorder(result, Budget(None), save, say, by_reason=True).run(todo, ask)
    assert requested == [t.name for t in todo] and len(saved) == len(todo)
    assert list(result["failures"]) == ["dequantize 8b pass pallas"]
    assert result["unavailable"] == {
        "`x`: needs a GPU\nof Hopper": ["dequantize 4096x4096 pallas"]
    }
    assert len(result["rows"]) == len(todo) - 2
    assert printed[0] == "dequantize 8b pass xla: 5000.0 us, 82% of the ceiling"
    assert printed[1].startswith("dequantize 8b pass pallas: FAILED: differs")
    # As JSON and back nothing changes.
    assert json.loads(json.dumps(result)) == result
    text = bench.table(result)
    line = "| 8b, all layers |  | 8-bit | yes | xla | 5,000.0 | 3,512 |  | 82% |"
    assert line in text
    assert "## Failed" in text and "differs from xla: 3 weights" in text
    assert "- `x`: needs a GPU of Hopper (1 rows)" in text


SMALL, WIDE, SQUARE, TUNED = (1024, 4096), (14336, 4096), (4096, 4096), (512, 512)
# us of implementations, in one stack with 8-bit scales.
TIMES = [
    ("matmul", SMALL, 1, {"xla": 9, "fused": 4}),
    ("matmul", SMALL, 2, {"xla": 9, "fused": 5}),
    ("matmul", SMALL, 16, {"xla": 9, "fused": 8.9}),
    ("matmul", SMALL, 32, {"xla": 20, "fused": 9}),
    ("matmul", SMALL, 128, {"xla": 9, "pallas": 1}),  # many rows: not fused
    ("matmul", WIDE, 1, {"xla": 9, "fused": 9}),
    ("matmul", WIDE, 2, {"xla": 9, "fused": 1}),
    ("matmul", SQUARE, 1, {"xla": 9, "fused": 5}),
    # Faster than xla, but not than dequantizing with the kernel first.
    ("matmul", SQUARE, 2, {"xla": 9, "fused": 6, "pallas": 5}),
    ("matmul", (64, 64), 1, {"xla": 9}),  # nothing to compare with
    ("matmul", TUNED, 64, {"xla": 9, "fused": 9}),
    *(("matmul", TUNED, n, {"xla": 9, "pallas": 9}) for n in (128, 256, 512, 1024)),
    ("dequantize", SMALL, 0, {"xla": 10, "pallas": 9}),
    ("dequantize", WIDE, 0, {"xla": 10, "pallas": 9.95}),  # noise
    ("backward", SMALL, 2048, {"xla": 10, "pallas": 1}),
]
# wgmma on `TUNED`: slower at 64 rows, faster at 128 and 256, not at 512; once more at
# 1,024.
WGMMA = {64: 9, 128: 7, 256: 8, 512: 9, 1024: 1}


def test_choices_follow_the_measured_times():
    result = empty()

    def add(us, kind, name, shape, rows, **more):
        task = bench.Task(kind, name, shape, rows, **more)
        result["rows"].append(row(task, us))

    for kind, shape, rows, times in TIMES:
        for name, us in times.items():
            add(us, kind, name, shape, rows)
    for name, us in (("xla", 1), ("pallas", 100)):  # another question
        add(us, "dequantize", name, SMALL, 0, stacked=False)
    for tile, us in ((4, 9), (8, 3)):
        add(us, "dequantize", "pallas", SMALL, 0, tuning=(("tile", tile),))
    for rows, us in WGMMA.items():
        add(us, "matmul", "wgmma", TUNED, rows, tuning=(("columns", 64),))
        add(us + 1, "matmul", "wgmma", TUNED, rows, tuning=(("columns", 128),))
    assert bench.choices(result) == {
        "device": "NVIDIA H200",
        "jax": "0.0",
        "fused_rows": {"1024x4096": 2, "14336x4096": 0, "4096x4096": 1, "512x512": 0},
        "wgmma_rows": {"512x512": [128, 256]},
        "dequantize": {"1024x4096": "pallas", "14336x4096": "xla"},
        "tuning": {"dequantize 1024x4096 0": {"tile": 8}}
        | {f"wgmma 512x512 {rows}": {"columns": 64} for rows in WGMMA},
    }
    text = bench.table(result)
    assert "512x512 128 to 256" in text
    assert "1024x4096 2, 14336x4096 0, 4096x4096 1" in text


class Fake:
    """Stands for a process with a GPU: pallas takes half the time of xla."""

    def __init__(self, command, log):
        self.description = {"device": "Fake GPU 1", "machine": {"jax": "0.0"}}
        if command[1].endswith("peer"):
            self.description = {"error": "ModuleNotFoundError: bitsandbytes"}

    def __call__(self, request):
        if request["do"] == "ceilings":
            return {"ceilings": CEILINGS}
        if request["kind"] == "backward":
            return {"failed": "differs from xla: all"}
        return {"timing": timing(50.0 if request["implementation"] == "xla" else 25.0)}

    def close(self):
        pass


@pytest.fixture
def options(tmp_path):
    return ["--output", str(tmp_path), "--tuned", str(tmp_path / "tuned")]


def test_a_run_writes_results_table_and_choices(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "Worker", Fake)
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
    assert not list(tmp_path.rglob("*partial"))
    assert bench.main([*options, "--only", "dequantize"]) == 0


def test_bitsandbytes_is_timed_on_the_quick_shapes(options, tmp_path, monkeypatch):
    class FakePeer(Fake):
        def __init__(self, command, log):
            super().__init__(command, log)
            if "error" in self.description:
                self.description = {"device": "Fake GPU 1", "peer": "torch 1"}

    monkeypatch.setattr(bench, "Worker", FakePeer)
    assert bench.main([*options, "--quick", "--peer-python", "python"]) == 1
    result = json.loads((tmp_path / "kernels_fake-gpu-1.json").read_text())
    assert result["peer"] == "torch 1"
    peers = [r for r in result["rows"] if r["implementation"] == "bitsandbytes"]
    assert peers and not any(r["stacked"] for r in peers)
    # The peer's failures are listed, and are not failures of the run.
    assert len(result["peer_failures"]) == 4 and len(result["failures"]) == 8


@pytest.mark.gpu
def test_the_benchmark_runs(options, tmp_path):
    options += ["--quick", "--only", "dequantize", "--model", "1b", "--budget", "60"]
    status = bench.main(options)
    (file,) = tmp_path.glob("kernels_*.json")
    result = json.loads(file.read_text())
    assert result["complete"] and result["rows"], result["failures"]
    assert status == 0, result["failures"]
    for measured in result["rows"]:
        assert 0 < measured["of_floor"] < 1.25, measured
