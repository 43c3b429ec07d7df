"""Steps of several GPUs as the compiler makes them: what their number does not change.

Llama-3.1-8B, r=32, a row of 8,192 tokens on every H200, in nodes of eight. Compiled
without a GPU (`make compile`): counted, not timed.
"""

import math
from collections import Counter

import jax
import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import categories, estimate, hlo
from qlora_jax.planning.compile import Compiled, compile_for
from qlora_jax.planning.exchange import expected_transfers
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import Step, gpu_mesh
from qlora_jax.planning.work import Sizes, count_kernels
from qlora_jax.training.config import TrainConfig

pytestmark = pytest.mark.compile

NODE, LENGTH = 8, 8192
MESHES = ({"fsdp": 8}, {"fsdp": 64}, {"data": 8, "fsdp": 8}, {"data": 64})
# Packed rows, with every kernel of a training step.
KERNELS = {"norms": "fused", "activation": "fused", "attention": "pallas"}
OTHERS = (
    ({"fsdp": 8}, {"remat": "offload"}, {}),  # two chunks, products on their own
    ({"fsdp": 8}, {}, {"gradient_accumulation_steps": 2}),
    ({"fsdp": 8}, {"remat": "save_matmuls"}, {}),
    ({"fsdp": 8}, KERNELS, {}),
    ({"data": 2, "context": 4}, {}, {}),
)


def devices(mesh: dict[str, int]) -> int:
    return math.prod(mesh.values())


def step_of(mesh: dict[str, int], compute: dict, train: dict) -> Step:
    return Step(
        LlamaConfig.from_hf(MODELS["8b"].hf_config),
        Compute(lora=LoraConfig(r=32), **compute),
        length=LENGTH,
        train=TrainConfig(
            steps=1, batch_size=devices(mesh) // mesh.get("context", 1), **train
        ),
        packed=compute.get("attention") == "pallas",
    )


def compiled(python: str, mesh: dict[str, int], *settings: dict) -> Compiled:
    step = step_of(mesh, *(settings or ({}, {})))
    options = {"per_node": NODE, "mesh": mesh} if devices(mesh) > 1 else {}
    options["program"] = True
    return compile_for(step, CARDS["h200"], python=python, **options)


def test_neither_all_reduces_nor_the_size_of_products_depend_on_the_number(
    gpu_compiler,
):
    few, many = (compiled(gpu_compiler, {"fsdp": n}) for n in (8, 64))
    numbers = [made.collectives["all-reduce"]["count"] for made in (few, many)]
    # The gradients of each of 32 layers; the number of tokens, and the loss.
    assert numbers == [34, 34]
    for made, mesh in ((few, {"fsdp": 8}), (many, {"fsdp": 64})):
        sizes = Sizes.of(step_of(mesh, {}, {}), mesh)
        products = [
            kernel.product
            for kernel in count_kernels(hlo.parse(made.program or ""), sizes)
            if kernel.product is not None
            and categories.category(kernel, sizes).startswith(categories.BASE)
        ]
        assert products
        assert all(LENGTH in p.left.sizes + p.right.sizes for p in products)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_weights_are_gathered_packed_but_for_the_tables_of_the_vocabulary(
    gpu_compiler, mesh
):
    program = hlo.parse(compiled(gpu_compiler, mesh).program or "")
    gathered = [
        array
        for call in hlo.executed(program)
        if call.instruction.operation.startswith("all-gather")
        for array in call.instruction.results
    ]
    # An adapter of gate_proj is the largest of what is not packed beside them.
    large = {str(a) for a in gathered if a.dtype != "u8" and a.count > 32 * 14336}
    table = {"bf16[128256,4096]", f"bf16[{128256 // mesh.get('fsdp', 1)},4096]"}
    assert large == (table if "fsdp" in mesh else set())
    assert ("fsdp" in mesh) == any(array.dtype == "u8" for array in gathered)


def test_a_device_runs_the_kernels_of_one_that_is_alone(gpu_compiler):
    def kernels(mesh):
        program = hlo.parse(compiled(gpu_compiler, mesh, KERNELS, {}).program or "")
        sizes = Sizes.of(step_of(mesh, KERNELS, {}), mesh)
        found = Counter()
        for kernel in count_kernels(program, sizes):
            if kernel.mosaic:
                found[kernel.mosaic, kernel.flops] += kernel.times
        return found

    alone, divided = kernels({"data": 1}), kernels({"fsdp": 8})
    # Of 32 layers: attention, two norms and an activation, and their derivatives.
    assert alone == divided and sum(alone.values()) >= 32 * (2 * 4 + 1)
    made = compiled(gpu_compiler, {"fsdp": 8}, KERNELS, {})
    assert made.collectives["all-reduce"]["count"] == 34


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_bytes_of_a_device_are_within_1_percent_of_the_formula(gpu_compiler, mesh):
    made = compiled(gpu_compiler, mesh).memory
    formula = estimate.step_memory(step_of(mesh, {}, {}), mesh)
    assert formula.device_bytes == pytest.approx(made.device_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("mesh", "compute", "train"), [*((mesh, {}, {}) for mesh in MESHES), *OTHERS]
)
def test_what_is_sent_is_within_3_percent_of_the_formula(
    gpu_compiler, mesh, compute, train
):
    made = compiled(gpu_compiler, mesh, compute, train).transfers
    formula = expected_transfers(step_of(mesh, compute, train), mesh, NODE)
    # Some gradients are scattered instead of summed, some adapters are gathered in
    # bfloat16 where the formula has float32: 1.8 % at most.
    for name in ("sent", "network_bytes"):
        counted, expected = (
            sum(getattr(transfer, name) for transfer in transfers)
            for transfers in (made, formula)
        )
        assert expected == pytest.approx(counted, rel=0.03)
    assert bool(sum(t.network_bytes for t in made)) == (devices(mesh) > NODE)


def test_nodes_are_processes_of_consecutive_devices(gpu_compiler, monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    assert jax.default_backend() == "cpu"
    mesh = gpu_mesh(CARDS["h200"], {"data": 4, "fsdp": 4}, NODE)
    nodes = [device.process_index for device in mesh.devices.flat]
    assert nodes == [0] * 8 + [1] * 8
