"""The options of XLA with which programs are compiled for a GPU.

    jax.jit(step, compiler_options=compiler_options())    for the device at hand
    @device_jit(static_argnames="program")                the same for a function

What runs on a GPU, and what `plan` and the tests compile without one, has the same
options. docs/gpu.md has what each of them changes in a training step, and why the other
candidates keep XLA's defaults.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.core

from pallas_kernels import device
from qlora_jax.errors import say

GPU_OPTIONS: Mapping[str, bool] = MappingProxyType(
    {
        # Triton's fusions of products are chosen by timing dozens of tilings of each:
        # neither time nor memory of a step could be planned, and processes differ.
        "xla_gpu_enable_triton_gemm": False,
        # The XLA of jax 0.11 writes a saved product directly into the stack of all
        # layers, and multiplies a second time for those that read it. (0.10 does not do
        # so by default, and 0.12 reads the stack.)
        **(
            {"xla_gpu_enable_dynamic_slice_fusion": False}
            if jax.__version__.startswith("0.11.")
            else {}
        ),
    }
)
"""Options of every program for a GPU."""

_FLAG = re.compile(r"--(\w+)(?:=(\S*))?")


def compiler_options(platform: str | None = None) -> dict[str, bool]:
    """Returns the options with which to compile a program: `jax.jit` takes them.

    A flag that the user has set in `XLA_FLAGS` takes precedence, with a note on stderr
    if it contradicts.

    Args:
      platform: "gpu", "cpu", ...; default that of the device at hand, or of the device
        of the abstract mesh in effect.

    Returns:
      Name -> value; empty if the platform is not "gpu".
    """
    if platform is None:
        platform = device.this_device().platform
    return dict(_checked(os.environ.get("XLA_FLAGS", ""))) if platform == "gpu" else {}


@functools.cache
def _checked(flags: str) -> Mapping[str, bool]:
    """Returns `gpu_options`, with its notes said the first time."""
    options, notes = gpu_options(flags)
    for note in notes:
        say(note)
    return options


def gpu_options(flags: str) -> tuple[dict[str, bool], list[str]]:
    """Returns the options for a GPU beside the user's flags, and notes on conflicts.

    Args:
      flags: value of `XLA_FLAGS`: flags, or as XLA has it the name of a file of them.
    """
    options, notes = dict(GPU_OPTIONS), []
    if flags and not flags.lstrip().startswith("-") and Path(flags).is_file():
        flags = Path(flags).read_text()
    # Of a flag that is given twice the last one counts.
    given = {match[1]: match[2] for match in _FLAG.finditer(flags)}
    for name, value in given.items():
        if name not in options:
            continue
        default = options.pop(name)
        # A flag without a value is true.
        if (value is None or value.lower() in ("true", "1")) != default:
            flag = f"--{name}" if value is None else f"--{name}={value}"
            notes.append(
                f"Note: XLA_FLAGS has `{flag}`, and programs for a GPU are otherwise "
                f"compiled with {str(default).lower()}. Yours is used: memory and time "
                "of a step are not those of `plan`."
            )
    return options, notes


class DeviceJit:
    """A function jitted with the options of the device that it is traced for."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        """Keeps what `jax.jit` gets; no device is opened before the first call."""
        functools.update_wrapper(self, function)
        self._jitted = functools.cache(
            lambda options: jax.jit(
                function, compiler_options=dict(options) or None, **settings
            )
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled function, or traces it as part of another program."""
        options = tuple(compiler_options().items())
        leaves = jax.tree.leaves((args, kwargs)) if options else ()
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            options = ()  # those of the whole program count
        return self._jitted(options)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function, as `jax.jit(function).lower` does."""
        options = tuple(compiler_options().items())
        return self._jitted(options).lower(*args, **kwargs)


def device_jit(**settings: Any) -> Callable[[Callable[..., Any]], DeviceJit]:
    """Returns a decorator that jits with `compiler_options`, looked up at each call.

    Args:
      settings: further arguments of `jax.jit`.
    """
    return functools.partial(DeviceJit, **settings)
