"""Trains one run file on devices, processes, Slurm and Ray, all of this machine's CPU.

    make launchers RUN=demo_run/run.toml         # after `make demo`

  one        one device
  devices    eight devices, which JAX makes of the CPU
  processes  two processes with four devices each
  slurm      the same, started by launch/slurm.sh on a cluster of this machine
  ray        the same, started by launch/ray_train.py

Under Slurm and Ray a process is killed after a checkpoint, and they start the run
again. The table shows how far the losses are from those of one device. It ends with
exit status 1 if that is more than sums in another order explain, or if what was killed
and continued does not end with the bits of what was not.

Slurm needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root; Ray
the environment of `make ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DEVICES = 8
PROCESSES = 2
# Of a loss, relative: float32 rounds by 6e-8, and every step starts from weights that
# differ already.
FIRST, LATER = 1e-6, 1e-4
# A way of training that has not ended by then hangs.
LIMIT = 1200.0


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    losses: list[float]
    mesh: dict[str, int]
    adapter: str
    """Hash of its file."""
    starts: int = 1

    @classmethod
    def read(cls, directory: Path, starts: int = 1) -> Trained:
        """Reads a complete run directory."""
        rows = (directory / "metrics.jsonl").read_text().splitlines()
        report = json.loads((directory / "report.json").read_text())
        adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        return cls(
            [json.loads(row)["loss"] for row in rows],
            report["plan"]["mesh"],
            hashlib.sha256(adapter).hexdigest(),
            starts,
        )


@dataclass(frozen=True)
class Job:
    """One way to train."""

    run_file: Path
    output: Path
    steps: int
    ray_python: Path

    @property
    def options(self) -> list[str]:
        """Of `qlora-jax train`, after the run file."""
        return [
            *("--output-dir", str(self.output)),
            *("--train.steps", str(self.steps)),
            *("--checkpoint.every", str(self.steps // 5)),
            *("--log.plot", "False"),
        ]

    def command(self) -> list[str]:
        """The command that trains."""
        program = [sys.executable, "-m", "qlora_jax.cli", "train", str(self.run_file)]
        return program + self.options

    def start(self, command: list[str], devices: int) -> subprocess.Popen:
        """Starts a program with so many devices, in the directory of the run file."""
        log = (self.output.parent / f"{self.output.name}.log").open("a")
        return subprocess.Popen(
            command,
            cwd=self.run_file.parent,
            env=environment(devices),
            stdout=log,
            stderr=log,
        )

    def one(self) -> None:
        """Trains on one device."""
        wait([self.start(self.command(), 1)])

    def devices(self) -> None:
        """Trains on all devices in one process."""
        wait([self.start(self.command(), DEVICES)])

    def processes(self) -> None:
        """Trains in several processes, started by hand."""
        address = f"127.0.0.1:{free_port()}"
        mesh = ["--mesh.coordinator", address, "--mesh.processes", str(PROCESSES)]
        wait(
            [
                self.start(
                    [*self.command(), *mesh, "--mesh.process", str(index)],
                    DEVICES // PROCESSES,
                )
                for index in range(PROCESSES)
            ]
        )

    def slurm(self) -> None:
        """Trains as a job of Slurm, and kills a process of it."""
        directory = self.output.parent / "slurm_cluster"
        script = [sys.executable, str(HERE / "slurm.py"), str(directory)]
        cluster = self.start([*script, *self.command()], DEVICES // PROCESSES)
        self.kill_one(cluster)
        wait([cluster])

    def ray(self) -> None:
        """Trains on a Ray cluster, and kills a process of it."""
        script = [str(self.ray_python), str(HERE / "ray_cluster.py"), str(PROCESSES)]
        launcher = [str(ROOT / "launch" / "ray_train.py"), str(self.run_file)]
        launcher += ["--nodes", str(PROCESSES)]
        launcher += ["--program", f"{self.ray_python} -m qlora_jax.cli"]
        launcher += ["--", *self.options]
        cluster = self.start([*script, *launcher], DEVICES // PROCESSES)
        self.kill_one(cluster)
        wait([cluster])

    def kill_one(self, launcher: subprocess.Popen) -> None:
        """Kills the last process of the run, some steps after its first checkpoint."""
        rows = self.output / "metrics.jsonl"
        enough = self.steps // 5 + 3
        deadline = time.monotonic() + LIMIT
        while not rows.exists() or len(rows.read_text().splitlines()) < enough:
            if launcher.poll() is not None or time.monotonic() > deadline:
                launcher.terminate()
                sys.exit(f"{self.output.name}: no {enough} steps; see its .log")
            time.sleep(0.05)
        os.kill(find_process(self.output, PROCESSES - 1), signal.SIGKILL)


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a program on so many devices of the CPU."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(ROOT),
    }


def find_process(output: Path, index: int) -> int:
    """Returns the id of a process that trains, by its command or its environment."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "qlora_jax.cli" not in words or str(output) not in words:
                continue
            if "--mesh.process" in words:
                number = words[words.index("--mesh.process") + 1]
            else:
                lines = (entry / "environ").read_bytes().decode().split("\0")
                name = "SLURM_PROCID="
                tasks = [line for line in lines if line.startswith(name)]
                number = tasks[0].removeprefix(name) if tasks else None
            if number == str(index):
                return int(entry.name)
    sys.exit(f"process {index} of {output.name} is not to be found")


def wait(processes: list[subprocess.Popen]) -> None:
    """Waits for programs; ends this one if one of them fails."""
    for process in processes:
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            for other in processes:
                other.terminate()
            sys.exit(f"exit status {status}: {process.args}")


def free_port() -> int:
    """Returns a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def train_all(options: argparse.Namespace) -> Iterator[tuple[str, Trained]]:
    """Trains in each way."""
    directory, run_file = options.directory.resolve(), options.run_file.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    # Not resolved: the interpreter of an environment is a link.
    ray_python = options.ray_python.absolute()
    for way in dict.fromkeys(["one", *options.ways]):
        output, starts = directory / way, 1 + (way in ("slurm", "ray"))
        if options.keep and (output / "report.json").exists():
            print(f"{way}: kept", file=sys.stderr)
            yield way, Trained.read(output, starts)
            continue
        shutil.rmtree(output, ignore_errors=True)
        (directory / f"{way}.log").unlink(missing_ok=True)
        began = time.monotonic()
        job = Job(run_file, output, options.steps, ray_python)
        getattr(job, way)()
        print(f"{way}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield way, Trained.read(output, starts)


def compare(results: Mapping[str, Trained]) -> bool:
    """Prints the table; returns whether all runs are as they should be."""
    one, whole = results["one"], results.get("processes")
    print("| | mesh | starts | loss of step 1 | of the last | difference | adapter |")
    print("|---|---|---|---|---|---|---|")
    correct = True
    for way, run in results.items():
        pairs = zip(run.losses, one.losses, strict=True)
        differences = [abs(a - b) / abs(b) for a, b in pairs]
        correct &= differences[0] <= FIRST and max(differences) <= LATER
        # The same mesh on the same processes.
        if whole is not None and run.starts > 1:
            correct &= run.losses == whole.losses and run.adapter == whole.adapter
        mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.items())
        print(
            f"| {way} | {mesh} | {run.starts} | {run.losses[0]:.6f} | "
            f"{run.losses[-1]:.6f} | {max(differences):.1e} | {run.adapter[:12]} |"
        )
    return correct


def main() -> None:
    """Trains in all ways and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ways = ("one", "devices", "processes", "slurm", "ray")
    add = parser.add_argument
    add("run_file", type=Path)
    add("directory", type=Path, help="for the runs and their logs")
    add("--ways", nargs="+", choices=ways, default=list(ways))
    add("--steps", type=int, default=40)
    add("--ray-python", type=Path, default=ROOT / ".venv-ray" / "bin" / "python")
    add("--keep", action="store_true", help="runs that are complete already")
    if not compare(dict(train_all(parser.parse_args()))):
        sys.exit("the runs differ more than they may")


if __name__ == "__main__":
    main()
