import dataclasses
import math

import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.ladder import policies
from qlora_jax.planning.mesh import choose_mesh, gpus_per_node
from qlora_jax.planning.plan import Planner
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig

H200 = CARDS["h200"]


def step_of(model: str, rows: int, length: int = 8192) -> Step:
    return Step(
        LlamaConfig.from_hf(MODELS[model].hf_config),
        Compute(lora=LoraConfig(r=32)),
        length=length,
        train=TrainConfig(steps=1, batch_size=rows),
    )


def choose(model="8b", rows=64, length=8192, gpu=H200, **more):
    more = {"nodes": 8, "per_node": 8, **more}
    return choose_mesh(step_of(model, rows, length), gpu, policies(gpu=gpu), **more)


@pytest.mark.parametrize(
    ("model", "gigabytes", "shape", "reason"),
    [
        ("8b", 141, {"data": 64}, "every GPU repeats the weights"),
        ("70b", 141, {"data": 64}, "every GPU repeats the weights"),
        ("70b", 40, {"data": 32, "fsdp": 2}, "2 GPUs of a node divide the weights"),
        ("70b", 11, {"data": 4, "fsdp": 16}, "16 GPUs of 2 nodes divide the weights"),
        ("70b", 3, {"fsdp": 64}, "even so it does not fit"),
    ],
)
def test_as_few_gpus_as_the_step_needs_divide_the_weights(
    model, gigabytes, shape, reason
):
    gpu = dataclasses.replace(H200, memory_bytes=gigabytes * 10**9)
    choice = choose(model, gpu=gpu, length=2048)
    assert choice.shape == shape
    assert reason in choice.reason
    # The step fits on what was chosen, and not where one GPU fewer in each group does.
    among = [policy for policy in policies() if policy.remat != "offload"]

    def fits(shape):
        planner = Planner(gpu, mesh=shape)
        plans = [planner.estimate(step_of(model, 64, 2048), p) for p in among]
        return any(plan.fits and not plan.uncertain for plan in plans)

    assert fits(shape) == ("not fit" not in choice.reason)
    if "fsdp" in shape:
        half = {"data": 128 // shape["fsdp"], "fsdp": shape["fsdp"] // 2}
        assert not fits(half)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (128, {"data": 64}),
        (16, {"data": 16, "context": 4}),
        (8, {"data": 8, "context": 8}),
    ],
)
def test_gpus_of_a_node_share_rows_that_are_too_few(rows, shape):
    choice = choose(rows=rows)
    assert choice.shape == shape
    assert ("share a row" in choice.reason) == (rows < 64)


@pytest.mark.parametrize(
    ("rows", "nearest"),
    [
        (4, "8"),  # a row would be shared by two nodes
        (65, "64 or 128"),
        (20, "16 or 32"),
    ],
)
def test_a_batch_that_cannot_be_divided_gets_the_nearest_that_can(rows, nearest):
    with pytest.raises(
        UserError, match=f"`batch_size`={rows} .* {nearest}\\.$"
    ) as error:
        choose(rows=rows)
    for number in nearest.split(" or "):
        sizes = choose(rows=int(number)).shape
        assert math.prod(sizes.values()) == 64
    assert str(error.value).count("must be a multiple of 64") == 1


def test_parts_of_a_row_are_made_equal_by_padding():
    choice = choose(rows=8, length=8190)
    assert choice.shape == {"data": 8, "context": 8}
    assert "2 tokens of padding" in choice.reason


def test_one_row_stays_on_one_gpu_unless_several_are_asked_for():
    alone = choose(rows=1, nodes=1, asked=False)
    assert (alone.shape, alone.idle) == ({"data": 1}, 7)
    assert "7 of 8 GPUs are idle" in alone.reason
    assert choose(rows=1, nodes=1).shape == {"context": 8}
    assert choose(rows=1, nodes=1, context=8, asked=False).shape == {"context": 8}
    assert choose(rows=1, nodes=1, per_node=1, asked=False).reason == "one GPU."


@pytest.mark.parametrize(
    ("fixed", "shape"),
    [
        ({"fsdp": 8}, {"data": 8, "fsdp": 8}),
        ({"data": 4}, {"data": 4, "fsdp": 16}),
        ({"data": 2, "context": 2}, {"data": 2, "fsdp": 16, "context": 2}),
        ({"data": 16, "fsdp": 4}, {"data": 16, "fsdp": 4}),
        ({"context": 2}, {"data": 32, "context": 2}),
        # Rows are fewer than GPUs: as without `data`.
        ({"data": 4, "rows": 16}, {"data": 4, "fsdp": 4, "context": 4}),
    ],
)
def test_fixed_sizes_are_kept_and_the_others_take_the_rest(fixed, shape):
    assert choose(**fixed).shape == shape


def test_fixed_sizes_may_leave_gpus_of_one_node_idle():
    choice = choose(nodes=1, data=2, fsdp=2)
    assert (choice.shape, choice.idle) == ({"data": 2, "fsdp": 2}, 4)
    assert "4 of 8 GPUs are idle" in choice.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": 3}, "must divide the number of GPUs, 64"),
        ({"data": 0}, "sizes are at least 1"),
        ({"data": 8, "fsdp": 16}, "must divide the number of GPUs, 64"),
        ({"data": 2, "fsdp": 2}, "has all of their GPUs"),
        ({"rows": 24, "fsdp": 2}, "multiple of 64 .data 32 x fsdp 2.. Nearest: 64"),
    ],
)
def test_fixed_sizes_that_divide_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        choose(**settings)


def test_more_than_eight_gpus_are_in_nodes_of_eight():
    assert [gpus_per_node(n) for n in (1, 6, 8, 12, 64)] == [1, 6, 8, 6, 8]
    assert gpus_per_node(64, 4) == 4
    assert gpus_per_node(4, 8) == 4
    with pytest.raises(UserError, match="12 GPUs in nodes of 8"):
        gpus_per_node(12, 8)
