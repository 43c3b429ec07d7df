"""Times and results as the benchmarks of a GPU record them."""

from typing import Any

CEILINGS = {"copy_gb_s": 4300.0, "matmul_tflop_s": 790.0}
"""The H200's, so that floors can be compared with known ones."""


def timing(us: float) -> dict[str, Any]:
    times = {"device_us": us, "spread": 0.01, "call_us": us + 5, "calls": 10}
    return times | {"method": "trace", "temporary_bytes": 2_000_000}


def empty() -> dict[str, Any]:
    """A result without a row."""
    result = {"device": "NVIDIA H200", "machine": {"jax": "0.0", "driver": "1"}}
    result |= {"method": "as the script says", "ceilings": CEILINGS, "rows": []}
    result |= {"failures": {}, "peer_failures": {}, "unavailable": {}, "left_out": []}
    return result | {"peer": "not asked for", "complete": True}
