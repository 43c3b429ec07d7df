import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4 import shapes
from scripts.bench_gpu import attention as bench
from scripts.bench_gpu.results import Recorder
from scripts.bench_gpu.worker import Budget
from tests.scripts.measured import empty, timing


def test_each_case_is_timed_by_all_that_take_it():
    todo = bench.tasks(("1b", "8b"))
    assert len(todo) == len(set(todo)) == 3 * 2 * 2 * 5
    assert not [t for t in todo if t.packed and t.implementation == "cudnn"]
    assert all(task.length * task.rows == bench.TOKENS for task in todo)
    quick = bench.tasks(("8b",), quick=True)
    assert set(quick) < set(todo) and len(quick) == 2 * 5
    assert quick[0].gradient and quick[0].packed


@pytest.mark.parametrize("length", [bench.COMPARED, 2048, 16384])
def test_packed_rows_hold_documents_and_padding(length):
    ids = bench.segments(length, True)
    assert ids.shape == (length,) and ids.dtype == np.int32
    padding = int(length * bench.PADDING)
    assert (ids[-padding:] == 0).all() and (ids[:-padding] > 0).all()
    assert (np.diff(ids[:-padding]) >= 0).all() and ids.max() > 1
    assert (bench.segments(length, False) == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_operations_are_those_of_the_unmasked_scores(packed):
    ids = bench.segments(2048, packed)
    scores = np.tril(ids[:, None] == ids[None, :])[ids > 0].sum()
    forward = bench.Task("8b", 2048, packed, False, "xla")
    assert forward.flops == 4 * 8 * 32 * 128 * scores  # 8 rows
    assert bench.Task("8b", 2048, packed, True, "xla").flops == 3.5 * forward.flops


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_timed_agrees_with_the_formula(packed, monkeypatch):
    small = shapes.Model("small", 64, 128, 2, 4, 2, 16)
    monkeypatch.setitem(shapes.MODELS, "small", small)
    task = bench.Task("small", 16384, packed, True, "xla")
    assert bench.mismatch(task) is None
    arrays = bench.operands(task, 64, 2)
    results = bench.implemented(task)(*arrays)
    assert [a.shape for a in results] == [(2, 64, n, 16) for n in (4, 4, 2, 2)]

    right = bench.attention
    monkeypatch.setattr(
        bench, "attention", lambda *a, **k: right(*a, **k) * jnp.bfloat16(1.25)
    )
    assert "out by" in bench.mismatch(task) and "dv by" in bench.mismatch(task)
    failed = bench.answer(task.request(1))["failed"]
    assert failed.startswith("differs from the formula")


def test_an_implementation_that_cannot_run_here_is_not_available():
    task = bench.Task("1b", 2048, False, False, "cudnn")
    assert "cannot be used here" in bench.answer(task.request(1))["unavailable"]


def test_results_become_a_table_and_a_choice():
    result = empty()
    times = {
        # us of (pallas, xla, cudnn) by length, for the derivative.
        ("8b", True): {2048: (5, 4, None), 8192: (5, 9, None), 16384: (5, 9, None)},
        ("8b", False): {2048: (5, 9, 6), 8192: (5, 9, 6), 16384: (5, 9, 5.05)},
    }

    def ask(request):
        if not request["gradient"]:
            return {"failed": "differs"}
        order = ("pallas", "xla", "cudnn")
        case = times[request["model"], request["packed"]][request["length"]]
        return {"timing": timing(case[order.index(request["implementation"])])}

    printed = []
    Recorder(result, Budget(None), say=printed.append).run(bench.tasks(("8b",)), ask)
    assert len(result["rows"]) == 15 and len(result["failures"]) == 15
    assert printed[0].startswith("8b derivative 2048 packed pallas: 5.0 us, ")
    assert bench.choices(result) == {
        "device": "NVIDIA H200",
        "jax": "0.0",
        # At 16,384 whole cuDNN is as fast but for noise.
        "from_length": {"128 packed": 8192, "128 whole": None},
    }
    text = bench.table(json.loads(json.dumps(result)))
    assert "| 8b | 2,048 | 8 | packed | derivative | pallas | 5.0 |" in text
    assert "| 2 |" in text  # MB
    assert "## Failed" in text and "8b output 2048 packed pallas: differs" in text
