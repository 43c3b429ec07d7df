"""The machine and the software that a run computes with, and what XLA tuned there.

Which of several algorithms computes a product on a GPU, XLA decides by timing them, so
another process may choose another, which sums in another order. A run keeps the choice
in its directory (`TUNING`) and uses it again when it is continued.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from convert import write_text
from qlora_jax.errors import say
from qlora_jax.reading import read_text

TUNING = "autotune.json"
_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = (
    *("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
)
# Installed on a machine with a GPU: JAX's plugin, and the libraries whose kernels run.
_GPU_PACKAGES = (
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cublas", "nvidia-cudnn-cu13"),
    *("nvidia-cuda-runtime", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12"),
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a result depends on."""
    installed = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_GPU_PACKAGES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in _PACKAGES:
                installed[name] = "not installed"
    return installed


def environment() -> dict[str, Any]:
    """Returns what a run's arithmetic depends on besides its settings.

    Returns:
      "device" (its kind), "driver" of an NVIDIA GPU, "platform" (JAX's, with the
      version of CUDA), "versions" of the libraries.
    """
    device = jax.devices()[0]
    driver = None
    with contextlib.suppress(OSError):
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", read_text(_DRIVER))
        driver = match[0] if match and device.platform == "gpu" else None
    return {
        "device": device.device_kind,
        "driver": driver,
        "platform": " ".join(str(device.client.platform_version).split()),
        "versions": versions(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two environments, as "name: before -> now".

    What was not recorded before is not compared.
    """

    def entries(values: Mapping[str, Any]) -> dict[str, Any]:
        rest = {k: values.get(k) for k in ("device", "driver", "platform")}
        known = values.get("versions") or {}
        return {k: v for k, v in (rest | dict(known)).items() if v is not None}

    old, new = entries(before), entries(now)
    return [
        f"{name}: {value} -> {new.get(name, 'none')}"
        for name, value in old.items()
        if new.get(name) != value
    ]


def note_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Notes on stderr that a run is continued in another environment."""
    different = changes(before, now)
    if different:
        say(
            "Note: this run is continued with other software or another device "
            f"({'; '.join(different)}). Kernels may round differently from here on: "
            "the result is as valid, and need not be bit for bit that of a run without "
            "the interruption."
        )


@dataclass
class Tuning:
    """What XLA chose when it compiled a run's programs: file name -> content."""

    environment: Mapping[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, environment: Mapping[str, Any]) -> Tuning:
        """Reads the choices of a run; empty, with a note, if they cannot be used."""
        tuning, problem = cls(environment), None
        if not path.is_file():
            problem = "is missing"
        else:
            try:
                content = json.loads(read_text(path))
                files = {
                    name: base64.b64decode(text, validate=True)
                    for name, text in content["files"].items()
                }
                inside = not any(Path(n).is_absolute() or ".." in n for n in files)
                if content["digest"] != _digest(files) or not inside:
                    problem = "is damaged"
                elif changes(content["environment"], environment):
                    problem = "is of another device or other software"
                else:
                    tuning.files = files
            except (
                # What is not JSON, base64 or UTF-8, and numbers of too many digits.
                *(OSError, ValueError, RecursionError),
                *(KeyError, TypeError, AttributeError),
            ):
                problem = "is damaged"
        if problem:
            say(
                f"Note: `{path}`, the kernels that XLA chose for this run, {problem}. "
                "They are chosen anew, and may round differently."
            )
        return tuning

    def write(self, path: Path) -> None:
        """Writes the choices atomically; nothing if XLA made none."""
        if not self.files:
            return
        encoded = {k: base64.b64encode(v).decode() for k, v in self.files.items()}
        content = {"environment": dict(self.environment), "digest": _digest(self.files)}
        write_text(path, json.dumps(content | {"files": encoded}, indent=1) + "\n")

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles for the device at hand with these choices, and adds to them."""
        with self.options(jax.default_backend()) as options:
            return lowered.compile(compiler_options=dict(options) or None)

    @contextlib.contextmanager
    def options(self, platform: str) -> Iterator[dict[str, str]]:
        """Yields compiler options with which XLA reads and adds to the choices.

        Empty unless the platform is "gpu"; and with JAX's compilation cache, which
        keeps the compiled programs themselves.
        """
        has_cache = getattr(jax.config, "jax_compilation_cache_dir", None)
        if platform != "gpu" or has_cache:
            yield {}
            return
        with tempfile.TemporaryDirectory(prefix="qlora-jax-") as name:
            folder = Path(name)
            for file, content in self.files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            # Read what is there, and add what is not: XLA's default mode.
            yield {"xla_gpu_per_fusion_autotune_cache_dir": name}
            found = (path for path in folder.rglob("*") if path.is_file())
            self.files = {
                str(path.relative_to(folder)): path.read_bytes() for path in found
            }


def _digest(files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return total.hexdigest()
