"""scripts/bench_logging.py: it notes steps as a run does, and says what that takes."""

import json
import subprocess
import sys


def test_it_measures_each_way_to_watch(repository, tmp_path):
    output = tmp_path / "logging.json"
    done = subprocess.run(
        [
            *(sys.executable, str(repository / "scripts/bench_logging.py")),
            *("--notes", "60", "--seconds", "0.2", "--step-seconds", "2.0"),
            *("--output", str(output)),
        ],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": str(repository),
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert set(report["notes"]) == {"plain lines", "bar", "bar, TensorBoard"}
    for row in report["notes"].values():
        assert 0 < row["median_ms"] <= row["p99_ms"]
        # By definition; one division and one product of float64.
        share = row["mean_ms"] / 1e3 / 2.0
        assert abs(row["share_of_a_step"] / share - 1) < 1e-12
    assert report["drawing_s"] > 0 and 0 <= report["bar_share_of_a_core"] < 1
    assert "of a step" in done.stdout
