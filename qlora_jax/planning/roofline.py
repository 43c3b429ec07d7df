"""Times that a GPU would take for the kernels of a program: counted, not measured.

    kernels = count_kernels(hlo.parse(text), sizes)
    timing = time_kernels(kernels, sizes, Rates.of(gpu, IDEAL))
    timing.seconds, timing.rows["attention, forward"].seconds

A kernel takes the longer of its bytes at the memory's rate and its operations at the
rate of its products, and every launch has a cost. The rates are those of the GPU's data
sheet times the share of them that kernels of a kind reach: `IDEAL` is what the best
kernels reach on their best shapes, a bound that a step stays above; `REACHABLE` is what
good kernels reach in a training step. Left out: hits in the L2 cache, the tails of
waves, what autotuning chooses, gaps in which the host is late, and communication
between devices, whose kernels are counted with no time. Transfers to the host run
beside the kernels, so a step takes the longer of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.planning import categories, hlo
from qlora_jax.planning.work import Kernel, Sizes, count_kernels

if TYPE_CHECKING:  # these import jax
    from qlora_jax.planning.gpus import GpuSpec
    from qlora_jax.planning.step import Step


@dataclass(frozen=True)
class Efficiency:
    """Shares of a data sheet's rates that kernels reach, and costs of a launch."""

    name: str
    memory: float
    """Of the bandwidth."""
    products: float
    """Of the dense rate of 16-bit products, by cuBLAS."""
    attention_forward: float
    """Of the rate of `products`, by cuDNN or our kernels."""
    attention_backward: float
    """The same."""
    tf32: float
    """Of half the dense 16-bit rate: float32 products on the tensor cores."""
    float32: float
    """Of the rate without tensor cores."""
    dequantization: float
    """Of the rate of `memory`: kernels that look codes up in a table."""
    rank_wide: float
    """Of the rate of `memory`: products with an adapter's rank as a dimension."""
    launch_s: float
    """Seconds between kernels that are launched one by one."""
    graph_launch_s: float
    """Seconds between kernels of one command buffer (CUDA graph)."""


# Launches that run ahead of the device leave 1.3 us between kernels; where the host is
# late, a launch takes 3 us and more. In a command buffer they take less by the figures
# of NVIDIA's "Getting Started with CUDA Graphs": 0.9 us between short kernels of a
# stream, 0.5 us between those of a graph.
_LAUNCH = 1.3e-6
_GRAPH = _LAUNCH * 0.5 / 0.9
# Best published kernels on large shapes: copies reach 0.9 of the bandwidth of an H200,
# cuBLAS and FlashAttention 3 about 0.8 of its dense 16-bit rate.
IDEAL = Efficiency(
    name="ideal",
    memory=0.9,
    products=0.8,
    attention_forward=1.0,
    attention_backward=1.0,
    tf32=0.8,
    float32=0.8,
    dequantization=1.0,
    rank_wide=1.0,
    launch_s=_LAUNCH,
    graph_launch_s=_GRAPH,
)
# Sustained under a power limit and with tails of waves: 690 TFLOP/s of products on an
# H200, 600 and 480 of attention, and of 4.8 TB/s 3.9 elementwise, 2.9 dequantizing and
# 2.4 in products as narrow as a rank.
REACHABLE = Efficiency(
    name="reachable",
    memory=0.9 * 3.9 / 4.32,
    products=0.8 * 690 / 790,
    attention_forward=600 / 690,
    attention_backward=480 / 690,
    tf32=0.8 * 330 / 400,
    float32=0.8 * 45 / 55,
    dequantization=2.9 / 3.9,
    rank_wide=2.4 / 3.9,
    launch_s=_LAUNCH,
    graph_launch_s=_GRAPH,
)
EFFICIENCIES = (IDEAL, REACHABLE)


@dataclass(frozen=True)
class Rates:
    """Rates of a GPU: FLOP/s of products, bytes/s of memory, seconds of launches."""

    name: str
    products: float
    attention_forward: float
    attention_backward: float
    tf32: float
    float32: float
    memory: float
    dequantization: float
    rank_wide: float
    host_link: float
    launch_s: float
    graph_launch_s: float

    @classmethod
    def of(cls, gpu: GpuSpec, efficiency: Efficiency) -> Rates:
        """Returns the rates of a GPU by its data sheet."""
        products = efficiency.products * gpu.flops
        memory = efficiency.memory * gpu.bandwidth
        float32 = efficiency.float32 * gpu.float32_flops
        return cls(
            name=efficiency.name,
            products=products,
            attention_forward=efficiency.attention_forward * products,
            attention_backward=efficiency.attention_backward * products,
            # TF32 came with the tensor cores of 8.0.
            tf32=efficiency.tf32 * gpu.flops / 2 if gpu.bfloat16 else float32,
            float32=float32,
            memory=memory,
            dequantization=efficiency.dequantization * memory,
            rank_wide=efficiency.rank_wide * memory,
            host_link=gpu.host_link,
            launch_s=efficiency.launch_s,
            graph_launch_s=efficiency.graph_launch_s,
        )

    def seconds(self, kernel: Kernel, category: str) -> float:
        """Returns the seconds of one launch of a kernel, its start not counted."""
        if category == categories.COLLECTIVES:
            return 0.0
        memory = self.memory
        if category == categories.DEQUANTIZE:
            memory = self.dequantization
        elif category.startswith(categories.LORA):
            memory = self.rank_wide
        return max(kernel.bytes / memory, kernel.flops / self._flops(kernel))

    def _flops(self, kernel: Kernel) -> float:
        if kernel.kind == "attention forward":
            return self.attention_forward
        if kernel.kind == "attention backward":
            return self.attention_backward
        if kernel.product is not None and kernel.product.left.dtype == "f32":
            return self.float32 if kernel.high_precision else self.tf32
        return self.products


@dataclass
class Row:
    """What the kernels of a category do and take in one run."""

    seconds: float = 0
    """Launches not counted."""
    bytes: float = 0
    """Of device memory."""
    flops: float = 0
    launches: int = 0

    def add(self, kernel: Kernel, seconds: float) -> None:
        """Adds all launches of a kernel that takes `seconds` each time."""
        self.seconds += kernel.times * seconds
        self.bytes += kernel.times * kernel.bytes
        self.flops += kernel.times * kernel.flops
        self.launches += kernel.times


@dataclass(frozen=True)
class Timing:
    """Times of one run of a program at one set of rates."""

    rates: Rates
    rows: Mapping[str, Row]
    """By category, the longest first."""
    graph_launches: int
    """Command buffers that are launched."""
    in_graphs: int
    """Kernels that they launch."""
    host_seconds: float
    """Of transfers to and from the host, beside the kernels."""

    @property
    def launches(self) -> int:
        """Kernels that run."""
        return sum(row.launches for row in self.rows.values())

    @property
    def launch_seconds(self) -> float:
        """Between kernels."""
        alone = self.launches - self.in_graphs + self.graph_launches
        rates = self.rates
        return alone * rates.launch_s + self.in_graphs * rates.graph_launch_s

    @property
    def kernel_seconds(self) -> float:
        """Sum of all kernels, without their launches."""
        return sum(row.seconds for row in self.rows.values())

    @property
    def seconds(self) -> float:
        """Of the run."""
        return max(self.kernel_seconds + self.launch_seconds, self.host_seconds)


def time_kernels(kernels: Sequence[Kernel], sizes: Sizes, rates: Rates) -> Timing:
    """Sums the times of kernels by category."""
    rows: dict[str, Row] = {}
    graphs: dict[int, int] = {}
    for kernel in kernels:
        category = categories.category(kernel, sizes)
        row = rows.setdefault(category, Row())
        row.add(kernel, rates.seconds(kernel, category))
        if kernel.graph is not None:
            # Recorded once, it is launched as often as any of its kernels.
            graphs[kernel.graph] = max(graphs.get(kernel.graph, 0), kernel.times)
    host_bytes = sum(k.times * k.host_bytes for k in kernels)
    return Timing(
        rates=rates,
        rows=dict(sorted(rows.items(), key=lambda item: -item[1].seconds)),
        graph_launches=sum(graphs.values()),
        in_graphs=sum(k.times for k in kernels if k.graph is not None),
        host_seconds=host_bytes / rates.host_link,
    )


def count_step(
    program: str,
    step: Step,
    gpu: GpuSpec,
    *,
    mesh: Mapping[str, int] | None = None,
    necessary_flops: float,
) -> dict[str, Any]:
    """Counts a compiled training step, as plain data.

    Args:
      program: scheduled HLO as text.
      step: what it computes, of all devices together.
      gpu: the data sheet of each device.
      mesh: sizes of the axes "data" and "fsdp"; default one device.
      necessary_flops: operations of the step on a device without recomputation.

    Returns:
      "tokens" of a step of all devices; "floor_seconds", the necessary operations at
      the ideal rate of products; "launches" and how many of them are "in_graphs"; for
      "ideal" and "reachable" rates {"seconds", "tokens_per_second",
      "launch_seconds"}; and by category {"bytes", "flops", "launches",
      "ideal_seconds", "reachable_seconds"}.
    """
    sizes = Sizes.of(step, mesh)
    kernels = count_kernels(hlo.parse(program), sizes)
    tokens = step.tokens * step.train.gradient_accumulation_steps
    return summary(kernels, sizes, gpu, tokens=tokens, necessary_flops=necessary_flops)


def summary(
    kernels: Sequence[Kernel],
    sizes: Sizes,
    gpu: GpuSpec,
    *,
    tokens: int,
    necessary_flops: float,
    necessary_bytes: float = 0,
) -> dict[str, Any]:
    """Returns what `count_step` does, of kernels that are counted already.

    Args:
      kernels: of one run of the program.
      sizes: of its step.
      gpu: the data sheet of each device.
      tokens: of a run of all devices.
      necessary_flops: operations on a device that no program can leave out.
      necessary_bytes: the same of what it has to read and write.
    """
    timings = [time_kernels(kernels, sizes, Rates.of(gpu, e)) for e in EFFICIENCIES]
    ideal = timings[0]
    result: dict[str, Any] = {
        "tokens": tokens,
        "floor_seconds": max(
            necessary_flops / ideal.rates.products,
            necessary_bytes / ideal.rates.memory,
        ),
        "necessary_flops": necessary_flops,
        "necessary_bytes": necessary_bytes,
        "launches": ideal.launches,
        "in_graphs": ideal.in_graphs,
        "graph_launches": ideal.graph_launches,
    }
    for timing in timings:
        result[timing.rates.name] = {
            "seconds": timing.seconds,
            "tokens_per_second": tokens / timing.seconds,
            "launch_seconds": timing.launch_seconds,
            "host_seconds": timing.host_seconds,
        }
    result["categories"] = {
        name: {
            **{
                f"{timing.rates.name}_seconds": timing.rows[name].seconds
                for timing in timings
            },
            **{k: v for k, v in dataclasses.asdict(row).items() if k != "seconds"},
        }
        for name, row in ideal.rows.items()
    }
    return result
