"""The gated activation with the low-rank products around it, for Hopper GPUs.

`forward` computes `silu(gate) up` and, of the down projection's adapter, A times it.
`backward` computes the derivative and, of the adapters around it, all products that sum
over the tokens: with the gradients of gate and up (B of both) and with the activation
itself (A of the down projection), which is computed again instead of being kept. Each
of these arrays is `intermediate_size` wide, so reading one again takes as long as the
rest of what a narrow product does, several times over.

These are the kernels (Pallas, Mosaic GPU); `pallas_kernels.gated.api` chooses and
checks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.gated import fragments
from pallas_kernels.gated.fragments import FEATURES, RANKS, TOKENS
from pallas_kernels.nf4.gpu import MULTIPROCESSORS, kernel
from pallas_kernels.norm import fragments as row_blocks
from pallas_kernels.norm.fragments import CHUNK, ROWS, WARPS

_BLOCKS = 12
"""Blocks of threads of `backward` for each multiprocessor, at least: four at a time,
three times over, so that the last ones to end leave little idle."""
_AHEAD = 2
"""Steps whose numbers are on their way to L2."""


def forward(
    gate_up: Float[Array, "T F2"], a: Float[Array, "R F"], *, interpret: Any = False
) -> tuple[Float[Array, "T F"], Float[Array, "T R"]]:
    """Computes `h = silu(gate) up` and `h a^T`, each rounded once.

    A block of threads takes 16 tokens.

    Args:
      gate_up: bfloat16 or float16, gate and up in turn; T a multiple of 16, F of 128.
      a: of the same dtype, R a multiple of 16.
      interpret: False, or what `plgpu.kernel` takes.
    """
    (count, _), (rank, features) = gate_up.shape, a.shape
    chunks = features // CHUNK
    most = 2 if interpret else 4
    groups = next(g for g in range(most, 0, -1) if chunks % g == 0)
    interpreted = bool(interpret)
    layout = row_blocks.layout()

    def gated_forward(
        gate_up: Any, a: Any, out: Any, inner: Any, inner_s: Any, done: Any
    ) -> None:
        group = jax.lax.axis_index("group")
        rows = pl.ds(jax.lax.axis_index("block") * ROWS, ROWS)

        def pairs_of(i: Any) -> Any:
            start = (group * (chunks // groups) + i) * CHUNK
            return gate_up.at[rows, pl.ds(2 * start, 2 * CHUNK)]

        def fetch(i: Any) -> None:
            """Starts to bring the features of a step to L2."""
            pairs = pairs_of(jnp.minimum(i, chunks // groups - 1))
            mosaic.prefetch(pairs, interpret=interpreted)

        for i in range(_AHEAD):
            fetch(i)

        def step(i: Any, sums: jax.Array) -> jax.Array:
            fetch(i + _AHEAD)
            start = (group * (chunks // groups) + i) * CHUNK
            gate, up = fragments.load_pairs(pairs_of(i), layout, interpret=interpreted)
            sigmoid = fragments.logistic(gate, layout, interpret=interpreted)
            h = (gate * sigmoid * up).astype(out.dtype)
            columns = pl.ds(start, CHUNK)
            row_blocks.store(out.at[rows, columns], h, interpret=interpreted)
            return row_blocks.add_inner(
                sums, h, a.at[:, columns], interpret=interpreted
            )

        zeros = jnp.zeros((WARPS * ROWS, rank), jnp.float32)
        zeros = plgpu.layout_cast(zeros, mosaic.accumulator(rank))
        sums = jax.lax.fori_loop(0, chunks // groups, step, zeros)
        mosaic.store_columns(inner_s.at[group], sums, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(group == 0)
        def _() -> None:
            total = row_blocks.total_inner(inner_s, rank, interpret=interpreted)
            mosaic.store_rows(inner.at[rows], total, interpret=interpreted)

    run = kernel(
        gated_forward,
        [
            jax.ShapeDtypeStruct((count, features), gate_up.dtype),
            jax.ShapeDtypeStruct((count, rank), gate_up.dtype),
        ],
        [
            plgpu.SMEM((groups, rank * mosaic.COLUMN), jnp.float32),
            plgpu.Barrier(num_arrivals=groups),
        ],
        grid={"block": count // ROWS},
        groups=groups,
        interpret=interpret,
    )
    h, inner = run(gate_up, a)
    return h, inner


def backward(
    gate_up: Float[Array, "T F2"],
    dh: Float[Array, "T F"],
    z: tuple[Float[Array, "T R1"], Float[Array, "T R2"], Float[Array, "T R3"]],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "T F2"], tuple[Float32[Array, "R F"], ...]]:
    """Computes the derivative, and `z_1^T dgate`, `z_2^T dup` and `z_3^T h`.

    A block of threads takes 32 features and goes over a part of the tokens; the sums of
    the parts are added up afterwards.

    Args:
      gate_up: as for `forward`, T a multiple of 64.
      dh: gradient of h, of the same dtype.
      z: of the same dtype, the ranks multiples of 16.
      interpret: False, or what `plgpu.kernel` takes.

    Returns:
      The gradients of gate and up in turn, rounded once, and the three products: of the
      rounded numbers, in float32.
    """
    count, features = dh.shape
    strips, steps = features // FEATURES, count // TOKENS
    parts = parts_for(strips, steps)
    tiles = [each.shape[1] // RANKS for each in z]
    # Tokens last: a thread multiplies neighbours of them.
    rows = jnp.concatenate([each.T for each in z])
    interpreted = bool(interpret)
    layout = fragments.layout()
    add = functools.partial(fragments.add_products, interpret=interpreted)

    def gated_backward(
        gate_up: Any, dh: Any, z: Any, out: Any, products: Any, sums_s: Any, done: Any
    ) -> None:
        strip, part = jax.lax.axis_index("strip"), jax.lax.axis_index("part")
        columns = pl.ds(strip * FEATURES, FEATURES)
        pairs = pl.ds(strip * 2 * FEATURES, 2 * FEATURES)

        def tokens_of(i: Any) -> Any:
            return pl.ds((part * (steps // parts) + i) * TOKENS, TOKENS)

        def fetch(i: Any) -> None:
            """Starts to bring the tokens of a step to L2."""
            tokens = tokens_of(jnp.minimum(i, steps // parts - 1))
            for ref in (gate_up.at[tokens, pairs], dh.at[tokens, columns]):
                mosaic.prefetch(ref, interpret=interpreted)

        for i in range(_AHEAD):
            fetch(i)

        def step(i: Any, sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
            fetch(i + _AHEAD)
            tokens = tokens_of(i)
            gate, up = fragments.load_pairs(
                gate_up.at[tokens, pairs], layout, interpret=interpreted
            )
            dh_part = fragments.load(dh.at[tokens, columns], interpret=interpreted)
            sigmoid = fragments.logistic(gate, layout, interpret=interpreted)
            silu = gate * sigmoid
            # silu' = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
            dgate = dh_part * up * (sigmoid + silu * (1.0 - sigmoid))
            dup = dh_part * silu
            fragments.store_pairs(
                out.at[tokens, pairs], dgate, dup, interpret=interpreted
            )
            added, first = [], 0
            for total, values in zip(sums, (dgate, dup, silu * up), strict=True):
                ranks = pl.ds(first, RANKS * len(total))
                added.append(add(total, z.at[ranks, tokens], values))
                first += RANKS * len(total)
            return added

        zeros = jnp.zeros((WARPS * RANKS, FEATURES), jnp.float32)
        zeros = plgpu.layout_cast(zeros, mosaic.accumulator(FEATURES))
        sums = jax.lax.fori_loop(
            0, steps // parts, step, [[zeros] * number for number in tiles]
        )
        flat = [tile for tiles in sums for tile in tiles]
        for number, tile in enumerate(flat):
            mosaic.store_columns(sums_s.at[number], tile, interpret=interpreted)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        lane = mosaic.iota((RANKS * FEATURES,), 0)
        place = fragments.column_of(lane % FEATURES) * mosaic.COLUMN + lane // FEATURES
        for number in range(len(flat)):
            # In a fixed order, unlike atomic additions: every run has the same bits.
            total: Any = None
            for warp in range(WARPS):
                value = mosaic.gather(
                    sums_s.at[number],
                    place + RANKS * warp,
                    jnp.float32,
                    interpret=interpreted,
                )
                total = value if total is None else total + value
            target = products.at[part, pl.ds(RANKS * number, RANKS), columns]
            mosaic.store_rows(target, total, interpret=interpreted)

    run = kernel(
        gated_backward,
        [
            jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype),
            jax.ShapeDtypeStruct((parts, rows.shape[0], features), jnp.float32),
        ],
        [
            plgpu.SMEM((sum(tiles), FEATURES * mosaic.COLUMN), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
        ],
        # Strips run first: blocks that run together read neighbouring features.
        grid={"part": parts, "strip": strips},
        interpret=interpret,
    )
    dgate_up, products = run(gate_up, dh, rows)
    products = products[0] if parts == 1 else products.sum(axis=0)
    ends = [RANKS * sum(tiles[: n + 1]) for n in range(2)]
    return dgate_up, tuple(jnp.split(products, ends))


def parts_for(strips: int, steps: int) -> int:
    """Returns into how many parts the tokens are divided.

    Args:
      strips: of 32 features.
      steps: of 64 tokens.
    """
    wanted = -(-_BLOCKS * MULTIPROCESSORS // strips)
    return next((n for n in range(wanted, steps) if steps % n == 0), steps)
