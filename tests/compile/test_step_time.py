"""The counted time of Llama-3.1-8B's training step on an H200 does not grow unseen.

step_8b_*.json are the counts on record, as the script writes them:

    python scripts/profile_step --model 8b --kernels xla --remat full \
        --json tests/compile/step_8b_full.json

A step that does less is recorded anew by that command; one that does more fails. For
other versions of jax, whose compiler fuses otherwise, only the sums are compared.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.planning import categories
from qlora_jax.planning.gpus import find_gpu
from scripts.profile_step.program import count

pytestmark = pytest.mark.compile

CASES = ("full", "save_matmuls")
# Sums of floats in another order.
ROUNDING = 1e-9
# Of what one version of the compiler leaves to another: fusions and copies.
OTHER_COMPILER = 0.03


@pytest.fixture(scope="module", params=CASES)
def counts(request, compile_step: Callable):
    """The count on record, and that of the step as it compiles now."""
    record = Path(__file__).with_name(f"step_8b_{request.param}.json")
    recorded = json.loads(record.read_text())
    chosen = recorded["settings"]
    program = compile_step(
        MODELS[chosen["model"]].hf_config,
        **{name: chosen[name] for name in ("batch", "length", "packed", "remat")},
        **{name: chosen[name] for name in ("attention", "kernels")},
    )
    counted, _, _ = count(chosen, program.text, find_gpu(chosen["gpu"]))
    return recorded, counted


def test_the_step_takes_no_longer_than_on_record(counts):
    recorded, counted = counts
    same = jax.__version__ == recorded["settings"]["jax"]
    slack = 1 + (ROUNDING if same else OTHER_COMPILER)
    for name in ("ideal", "reachable"):
        assert counted[name]["seconds"] <= recorded[name]["seconds"] * slack, name


def test_no_category_grows(counts):
    recorded, counted = counts
    if jax.__version__ != recorded["settings"]["jax"]:
        pytest.skip(f"recorded with jax {recorded['settings']['jax']}")
    grown = {}
    for name, row in counted["categories"].items():
        budget = recorded["categories"].get(name)
        for kind in ("reachable_seconds", "flops", "launches"):
            limit = budget[kind] if budget else 0
            if row[kind] > limit * (1 + ROUNDING):
                grown[name, kind] = (limit, row[kind])
    assert not grown


def test_nearly_every_kernel_has_a_category(counts):
    _, counted = counts
    other = sum(
        row["reachable_seconds"]
        for name, row in counted["categories"].items()
        if name.startswith(categories.OTHER)
    )
    assert other < 0.01 * counted["reachable"]["seconds"]


def test_operations_are_those_of_the_formula(counts):
    recorded, counted = counts
    flops = sum(row["flops"] for row in counted["categories"].values())
    repeated = sum(
        row["flops"]
        for name, row in counted["categories"].items()
        if name.endswith("recomputed")
    )
    # Adapters of joined layers are one product, whose zero blocks are multiplied too.
    assert 1 <= (flops - repeated) / counted["necessary_flops"] < 1.01
    assert bool(repeated) == (recorded["settings"]["remat"] == "full")
