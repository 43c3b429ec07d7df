import json
import os
import sys
import time
from pathlib import Path

import jax
import pytest

from scripts.bench_gpu import attention, kernels, model
from scripts.gpu_check import __main__ as check
from scripts.gpu_check.parts import gpu_tests

benches = {"attention": attention, "kernels": kernels, "model": model}
DECODE = {"tokens_per_s": 400.0, "ms_per_step": 2.5, "prefill_ms": 60.0}
DECODE["floor_tokens_per_s"] = 925.0
TRAIN = {"tokens_per_s": 10_000.0, "step_s": 0.8192, "flops_per_token": 32e9}
TRAIN |= {"mfu": 0.3236, "peak_bytes": 14e9, "planned_bytes": 13.9e9}
TRAIN["losses"] = [12.5, 12.0]
KERNELS = {"ceilings": {"copy_gb_s": 4300.0, "matmul_tflop_s": 800.0}, "rows": []}
ATTENTION = {"rows": [], "unavailable": {"1b": "no cuDNN"}}
BENCHES = {
    "kernels": (KERNELS, "# NF4 kernels\n\n## matmul\n\nrows\n"),
    "attention": (ATTENTION, "# Attention\n\n## Failed\n\nit\n"),
}


def fake_gpu(command, seconds):
    """Answers as the parts do on a machine with a GPU."""
    text = " ".join(command)
    if "pytest" in text:
        return 1, "...F\nFAILED tests/x.py::test_y\n1 failed, 3 passed in 2.0s\n"
    for name, (result, table) in BENCHES.items():
        if f"bench_gpu {name}" in text:
            folder = Path(command[command.index("--output") + 1])
            (folder / f"{name}_fake.json").write_text(json.dumps(result))
            (folder / f"{name}_fake.md").write_text(table)
            return 0, "progress\n"
    if "--kernels pallas" in text and "decode" in text:
        return 0, "a remark\n" + json.dumps({"unavailable": "no Hopper"}) + "\n"
    if "scripts/peer gpu decode" in text:
        slow = {"tokens_per_s": 30.0, "floor_tokens_per_s": None}
        return 0, json.dumps(DECODE | slow)
    if "unsloth" in text:
        return 0, json.dumps({"unavailable": "unsloth is not installed"})
    if "scripts/peer gpu train" in text:
        slow = {"tokens_per_s": 4_000.0, "step_s": 2.048, "peak_bytes": 40e9}
        return 0, json.dumps(slow)
    if "decode" in text:
        return 0, json.dumps(DECODE)
    if "save_matmuls" in text:
        return None, "compiling"
    return 0, json.dumps(TRAIN)


def parts(*arguments):
    return check.list_parts(check.parser().parse_args(arguments))


def test_parts_come_in_order_of_importance():
    names = [part.name for part in parts()]
    assert names[:3] == [
        "train none xla",
        "train none fused",
        "train full xla",
    ]
    assert names[-1] == "tests"
    assert len(names) == len(set(names))
    assert not any("transformers" in name or "checkpoint" in name for name in names)
    more = parts("--model", "m", "--peer-python", "p", "--budget", "3000")
    more = {part.name: part for part in more}
    assert {"train checkpoint", "decode 16 transformers"} < set(more)
    assert "--quick" not in more["kernels"].command
    assert more["kernels"].limit == 1200


def test_the_parts_name_files_that_exist(repository):
    for part in parts("--model", "m", "--peer-python", "p"):
        assert part.command[1] == "-m" or Path(part.command[1]).exists(), part
    files = gpu_tests()
    assert str(repository / "tests/scripts/test_bench_gpu_kernels.py") in files
    # Marked by the conftest.py of their folder.
    assert str(repository / "tests/pallas_kernels/nf4/test_decode.py") in files
    assert str(repository / "tests/test_cli.py") not in files


def test_each_part_is_reported_and_the_next_still_runs():
    result = {"device": "Fake GPU 1", "machine": {"jax": "0.0"}, "parts": {}}
    printed = []
    runner = check.Runner(fake_gpu, say=printed.append)
    runner.run(parts("--peer-python", "p"), result["parts"], 1e4)
    outcome = "; ".join(f"{n}: {r['status']}" for n, r in result["parts"].items())
    assert outcome == (
        "train none xla: ok; train none fused: ok; train full xla: ok; "
        "train qwen3-8b recipe: ok; train none transformers: ok; "
        "train full transformers: ok; train qwen3-8b transformers: ok; "
        "train none unsloth: not available; train full unsloth: not available; "
        "train save_matmuls xla: out of time; "
        "train save_matmuls loop: out of time; train packed attention: out of time; "
        "train none separate adapters: ok; "
        "train qwen3-0.6b: ok; train qwen3-1.7b: ok; attention: ok; kernels: ok; "
        "decode 1 xla: ok; decode 1 pallas: not available; train full pallas: ok; "
        "decode 16 xla: ok; decode 16 pallas: not available; train 131072 full: ok; "
        "train 262144 offload: ok; decode 1 transformers: ok; "
        "decode 16 transformers: ok; tests: failed"
    )
    assert result["parts"]["kernels"]["result"] == KERNELS
    assert "1 failed, 3 passed" in printed[-1]
    text = check.table(json.loads(json.dumps(result)))  # as it is written and read
    for line in (
        "| tests | failed: 1 failed, 3 passed in 2.0s |",
        "| 1 | xla | 400.0 | 2.50 | 60.0 | 925 | 43% |",
        "| 1 | transformers | 30.0 | 2.50 | 60.0 | 925 | 3% |",
        "| full xla | 10,000 | 819.2 | 32.4% | 40% | 14.0 | 13.9 | 12.500 to 12.000 |",
        "- full transformers: 4,000 tokens/s, peak 40.0 GB; ours (full xla) 2.50 times",
        "    no Hopper",
        "    compiling",
        "\n## NF4 kernels\n\n### matmul\n",
        "\n## Attention\n\n### Failed\n",
    ):
        assert line in text


def test_what_does_not_fit_is_left_out():
    now = [0.0]

    def execute(command, seconds):
        now[0] += 100
        return fake_gpu(command, seconds)

    records = {}
    check.Runner(execute, clock=lambda: now[0]).run(parts(), records, 250.0)
    ran = [name for name, r in records.items() if r["status"] != "left out"]
    assert ran == [part.name for part in parts()[:3]]
    assert len(records) == len(parts())
    text = check.table({"device": "Fake GPU 1", "machine": {}, "parts": records})
    assert "| kernels | left out | 0 |" in text


def test_no_tests_is_not_a_failure():
    record = check.run_part(parts()[-1], 60, execute=lambda *a: (5, "no tests ran"))
    assert record["status"] == "no tests"


@pytest.mark.parametrize(("limit", "budget"), [(200, 155), (40, 20)])
def test_a_benchmark_gets_less_time_than_its_part(limit, budget):
    seconds = []

    def execute(command, limit):
        seconds.append(float(command[command.index("--budget") + 1]))
        return 1, "boom"

    part = next(part for part in parts() if part.name == "kernels")
    record = check.run_part(part, limit, execute=execute)
    assert seconds == [budget]
    assert record["status"] == "failed" and record["result"] is None


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "pid"
    program = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    status, output = check.run_child(command, 5, os.environ)
    assert status is None and output == "started\n"
    pid = int(mark.read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the part is still there")
    status, output = check.run_child([sys.executable, "-c", "1/0"], 20, os.environ)
    assert status == 1 and "ZeroDivisionError" in output
    assert check.run_child([str(tmp_path / "none")], 5, os.environ)[0] == 127


def test_a_run_writes_one_result_and_a_table(tmp_path, monkeypatch, capsys):
    probe = {"platform": "gpu", "device": "Fake GPU 1", "jax": "0.0"}

    def child(command, seconds, environment):
        if command[1] == "-c":
            return 0, json.dumps(probe)
        return fake_gpu(command, seconds)

    monkeypatch.setattr(check, "run_child", child)
    arguments = ["--output", str(tmp_path), "--only", "decode 1 xla", "--only", "tests"]
    assert check.main(arguments) == 1  # a test failed
    stored, table = sorted(tmp_path.iterdir())
    name = "gpu_check_fake-gpu-1"
    assert (stored.name, table.name) == (f"{name}.json", f"{name}.md")
    result = json.loads(stored.read_text())
    assert result["complete"] and result["device"] == "Fake GPU 1"
    assert result["machine"] == {"jax": "0.0"}
    assert list(result["parts"]) == ["decode 1 xla", "tests"]
    assert table.read_text() == check.table(result)
    assert "decode 1 xla: ok" in capsys.readouterr().out
    # A later call keeps what it does not run again.
    assert check.main([*arguments[:2], "--part", "decode 1 xla"]) == 0
    result = json.loads(stored.read_text())
    assert result["parts"]["tests"]["status"] == "failed"
    assert check.main(["--only", "decode"]) == 2
    assert "no part decode; the parts are train none xla," in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_writes_nothing(run_script, tmp_path):
    if "gpu" in os.environ.get("JAX_PLATFORMS", "") or jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    out = tmp_path / "out"
    done = run_script("gpu_check", "--output", out, alone=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    # The reason is the platform that the probe reports, not that the probe failed.
    assert "gpu_check: jax finds no GPU here (its device is cpu)" in done.stderr
    assert not out.exists()


def test_the_list_needs_no_gpu(run_script):
    done = run_script("gpu_check", "--list", alone=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train none xla ")
    assert "train full pallas" in done.stdout


def test_a_dry_run_executes_a_part_with_a_narrow_model(capsys):
    for part in parts("--dry-run"):  # every benchmark takes the options of its parts
        options = [word.format(folder="f", seconds="9") for word in part.command[2:]]
        if "pytest" not in part.command:
            benches[options[0]].parser().parse_args([*options[1:], "--dry-run"])
    name = "train qwen3-0.6b"
    assert check.main(["--dry-run", "--part", name]) == 0
    out = capsys.readouterr().out
    assert f"{name}: ok" in out and "| qwen3-0.6b |" in out


def test_a_dry_run_of_the_tests_collects_them(monkeypatch):
    commands = []
    monkeypatch.setattr(check, "run_child", lambda *a: (commands.append(a[0]), ""))
    check.dry_run(parts()[-1].command, 1.0)
    check.dry_run(parts()[0].command, 1.0)
    assert [command[-1] for command in commands] == ["--collect-only", "--dry-run"]
