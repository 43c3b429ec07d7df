import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(repository) -> SimpleNamespace:
    """The names of bench_attention.py."""
    path = repository / "scripts/bench_attention.py"
    return SimpleNamespace(**runpy.run_path(str(path), run_name="bench_attention"))


def timing(us: float) -> dict:
    found = {"device_us": us, "spread": 0.01, "call_us": us + 5, "calls": 10}
    return found | {"method": "trace", "temporary_bytes": 2_000_000}


def empty() -> dict:
    result = {"device": "NVIDIA H200", "machine": {"jax": "0.0", "driver": "1"}}
    result |= {"rows": [], "failures": {}, "unavailable": {}, "left_out": []}
    return result | {"complete": True}


def test_each_case_is_timed_by_all_that_take_it(bench):
    todo = bench.tasks(("1b", "8b"))
    assert len(todo) == len(set(todo)) == 3 * 2 * 2 * 5
    assert not [t for t in todo if t.packed and t.implementation == "cudnn"]
    assert all(task.length * task.rows == bench.TOKENS for task in todo)
    quick = bench.tasks(("8b",), quick=True)
    assert set(quick) < set(todo) and len(quick) == 2 * 5
    assert quick[0].gradient and quick[0].packed


def test_packed_rows_hold_documents_and_padding(bench):
    for length in (bench.COMPARED, 2048, 16384):
        ids = bench.segments(length, True)
        assert ids.shape == (length,) and ids.dtype == np.int32
        padding = int(length * bench.PADDING)
        assert (ids[-padding:] == 0).all() and (ids[:-padding] > 0).all()
        assert (np.diff(ids[:-padding]) >= 0).all() and ids.max() > 1
        assert (bench.segments(length, False) == 1).all()


def test_operations_are_those_of_the_scores_that_are_seen(bench):
    for packed in (False, True):
        ids = bench.segments(2048, packed)
        seen = np.tril(ids[:, None] == ids[None, :])[ids > 0].sum()
        forward = bench.Task("8b", 2048, packed, False, "xla")
        assert forward.flops == 4 * 8 * 32 * 128 * seen  # 8 rows
        assert bench.Task("8b", 2048, packed, True, "xla").flops == 3.5 * forward.flops


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_timed_agrees_with_the_formula(bench, packed, monkeypatch):
    from pallas_kernels.nf4 import shapes

    small = shapes.Model("small", 64, 128, 2, 4, 2, 16)
    monkeypatch.setitem(shapes.MODELS, "small", small)
    task = bench.Task("small", 16384, packed, True, "xla")
    assert bench.mismatch(task) is None
    arrays = bench.operands(task, 64, 2)
    found = bench.chosen(task)(*arrays)
    assert [a.shape for a in found] == [(2, 64, n, 16) for n in (4, 4, 2, 2)]

    def wrong(*arguments, **named):
        return real(*arguments, **named) * jnp.bfloat16(1.25)

    real = bench.chosen.__globals__["attention"]
    monkeypatch.setitem(bench.chosen.__globals__, "attention", wrong)
    assert "out by" in bench.mismatch(task) and "dv by" in bench.mismatch(task)
    failed = bench.answer(vars(task) | {"traces": 1})["failed"]
    assert failed.startswith("differs from the formula")


def test_what_cannot_run_here_is_not_available(bench):
    task = bench.Task("1b", 2048, False, False, "cudnn")
    found = bench.answer(vars(task) | {"traces": 1})
    assert "cannot be used here" in found["unavailable"]


def test_results_become_a_table_and_a_choice(bench):
    result, said = empty(), []
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

    todo = bench.tasks(("8b",))
    bench.run_tasks(todo, ask, result, bench.Budget(None), say=said.append)
    assert len(result["rows"]) == 15 and len(result["failures"]) == 15
    assert said[0].startswith("8b derivative 2048 packed pallas: 5.0 us, ")
    assert bench.choices(result) == {
        "device": "NVIDIA H200",
        "jax": "0.0",
        # At 16,384 whole cuDNN is as fast but for noise.
        "from_length": {"128 packed": 8192, "128 whole": None},
    }
    result = json.loads(json.dumps(result))
    text = bench.table(result)
    assert "| 8b | 2,048 | 8 | packed | derivative | pallas | 5.0 |" in text
    assert "| 2 |" in text  # MB
    assert "## Failed" in text and "8b output 2048 packed pallas: differs" in text


def test_what_was_left_out_is_said(bench):
    result = empty() | {"complete": False}
    todo = bench.tasks(("8b",), quick=True)
    bench.run_tasks(todo, lambda r: {}, result, bench.Budget(0.0))
    assert result["left_out"] == [task.name for task in todo]
    text = bench.table(result)
    assert "## Left out for want of time" in text and "Not complete" in text
    assert bench.choices(result)["from_length"] == {}


def test_without_a_gpu_nothing_is_written(repository, tmp_path):
    folders = "--output", str(tmp_path / "o"), "--tuned", str(tmp_path / "t")
    done = subprocess.run(
        [sys.executable, "scripts/bench_attention.py", "--quick", *folders],
        cwd=repository,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "no GPU" in done.stderr and "nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_what_would_run(bench, capsys):
    assert bench.main(["--dry-run", "--model", "1b", "--quick"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "1b derivative 8192 packed pallas" and len(listed) == 10
