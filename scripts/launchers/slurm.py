"""Runs a command by launch/slurm.sh on a Slurm cluster of this machine.

    python slurm.py DIRECTORY COMMAND [ARGUMENT ...]

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root. The cluster
is one node, on which the job has two tasks; its files are in the directory, and it is
gone when the script ends. Ends with exit status 1 if the job does not complete.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
# A job that is started again waits for this time.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


def main() -> None:
    """Starts the cluster, runs the job and shows its log."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with cluster(directory) as environment:
        run_job(directory, options.command, environment)


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[dict[str, str]]:
    """Runs the daemons; yields the environment of Slurm's commands."""
    for name in ("state", "spool"):
        (directory / name).mkdir(exist_ok=True)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config = directory / "slurm.conf"
    config.write_text(
        CONFIG.format(
            directory=directory,
            host=socket.gethostname(),
            port=free_port(),
            node_port=free_port(),
        )
    )
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [
        f"--{name}-file={directory}/munge.{name}" for name in ("pid", "log", "seed")
    ]
    munge.append(f"--socket={directory}/munge.socket")
    daemons = [
        munge,
        ["slurmctld", "-D", "-i", "-f", str(config)],
        ["slurmd", "-D", "-f", str(config)],
    ]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            log = stack.enter_context((directory / f"{daemon[0]}.log").open("w"))
            process = subprocess.Popen(
                daemon, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            stack.callback(stop, process)
            time.sleep(1)
        yield environment


def stop(process: subprocess.Popen) -> None:
    """Ends a daemon."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """Returns a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_job(directory: Path, command: list[str], environment: dict[str, str]) -> None:
    """Submits the job and waits for its end."""
    log = directory / "job.log"
    log.unlink(missing_ok=True)
    submit = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2"]
    submit += [f"--output={log}"]
    job = subprocess.run(
        [*submit, str(ROOT / "launch" / "slurm.sh"), *command],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    print(f"job {job}: {log}", flush=True)

    def ended() -> str:
        shown = ["scontrol", "show", "job", job]
        text = subprocess.run(
            shown, env=environment, capture_output=True, text=True
        ).stdout
        state = re.search(r"JobState=(\w+)", text)
        running = state and state[1] in ("RUNNING", "PENDING", "COMPLETING")
        return "" if running or not state else f"{state[1]}, {' '.join(text.split())}"

    end = wait_for("the end of the job", ended)
    print(log.read_text())
    fields = re.findall(r"(?:JobState|Restarts|ExitCode)=\S+", end)
    print(f"job {job}: {' '.join(fields)}")
    if "JobState=COMPLETED" not in fields:
        sys.exit(1)


def wait_for(what: str, check: Callable[[], object], seconds: float = 1200.0) -> str:
    """Waits until a check gives something, and returns it as a string."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = check()
        if result:
            return str(result)
        time.sleep(0.5)
    sys.exit(f"{what} did not come within {seconds:g} s; the logs are beside the job's")


if __name__ == "__main__":
    main()
