"""What a launcher starts again is what may pass; Slurm's commands are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "slurm.sh"


@pytest.fixture
def slurm(tmp_path):
    """A function: the step's command, variables -> (exit status, what was called)."""
    # `scontrol` fails, so that the script does not wait to be ended.
    for name, body in (
        ("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/calls; exit 1'),
        ("scancel", f"echo scancel >> {tmp_path}/calls; touch {tmp_path}/stopping"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(command, **variables):
        done = subprocess.run(
            ["bash", str(SCRIPT), "bash", "-c", command],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
            | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        calls = tmp_path / "calls"
        return done.returncode, calls.read_text() if calls.exists() else ""

    return run


@pytest.mark.parametrize(
    ("status", "again"),
    [
        *((0, False), (1, False), (2, False), (130, False), (143, False)),
        *((75, True), (134, True), (137, True), (139, True)),
    ],
)
def test_a_job_is_started_again_if_its_failure_may_pass(slurm, status, again):
    ended, calls = slurm(f"exit {status}")
    assert ended == status
    assert calls == ("requeue 7\n" if again else "")


def test_a_job_is_not_started_again_for_ever(slurm):
    assert slurm("exit 75", SLURM_RESTART_COUNT="20") == (75, "")


def test_a_job_whose_time_is_up_saves_and_is_started_again(slurm):
    # The script gets USR1, tells the tasks, and waits for them to save.
    command = "kill -USR1 $PPID; until [ -e stopping ]; do sleep 0.1; done; exit 143"
    assert slurm(command) == (143, "scancel\nrequeue 7\n")
