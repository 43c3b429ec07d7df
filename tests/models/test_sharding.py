import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.sharding import (
    check_mesh,
    cut_chunks,
    is_on_host,
    join_chunks,
    local_bytes,
    local_shape,
    pad_chunks,
    shard_step,
    traced_on,
)
from qlora_jax.planning.step import Step, abstract_arguments
from qlora_jax.training.config import TrainConfig
from qlora_jax.tree import EMBEDDING, HEAD

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)


def arguments(batch_size=8):
    train = TrainConfig(steps=1, batch_size=batch_size)
    compute = Compute(lora=LoraConfig(r=256))
    return abstract_arguments(Step(CONFIG, compute, length=64, train=train))


def spec(leaf):
    return leaf.sharding.spec


def test_fsdp_divides_rows_of_weights_and_packed_ones_with_their_scales():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    state, base, batch = shard_step(arguments(), mesh)
    down = base["model"]["layers"]["mlp"]["down_proj"]["weight"]
    assert down.codes.shape == (2, 1024, 2048)
    assert spec(down.codes) == PartitionSpec(None, "fsdp")
    assert spec(base["model"]["embed_tokens"]["weight"]) == PartitionSpec("fsdp")
    assert spec(base["lm_head"]["weight"]) == PartitionSpec("fsdp")
    assert spec(base["model"]["norm"]["weight"]) == PartitionSpec()
    assert spec(batch["tokens"]) == PartitionSpec(None, ("data", "fsdp"))
    assert local_bytes(batch["tokens"]) == 4 * 64
    assert spec(state.key) == PartitionSpec()


def test_fsdp_divides_adapters_and_moments_along_the_long_axis():
    mesh = AbstractMesh((4,), ("fsdp",))
    state, _, _ = shard_step(arguments(batch_size=4), mesh)
    moments = state.opt_state[1][0].mu
    for tree in (state.adapters, moments):
        gate = tree["model"]["layers"]["mlp"]["gate_proj"]
        assert gate["lora_A"].shape == (2, 256, 1024)
        assert spec(gate["lora_A"]) == PartitionSpec(None, None, "fsdp")
        assert gate["lora_B"].shape == (2, 4096, 256)
        assert spec(gate["lora_B"]) == PartitionSpec(None, "fsdp")
        assert local_bytes(gate["lora_B"]) == 4 * 2 * 4096 * 256 // 4


def test_data_parallelism_replicates_weights():
    mesh = AbstractMesh((2,), ("data",))
    unsharded = arguments(batch_size=2)
    state, base, batch = shard_step(unsharded, mesh)
    assert all(spec(leaf) == PartitionSpec() for leaf in jax.tree.leaves((base, state)))
    assert local_bytes(batch["labels"]) == local_bytes(unsharded[2]["labels"]) // 2


def test_only_the_named_tables_are_in_host_memory():
    mesh = AbstractMesh((1,), ("data",))
    placed = shard_step(arguments(), mesh, (EMBEDDING, HEAD))
    on_host = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
        if is_on_host(leaf)
    ]
    assert on_host == ["1.lm_head.weight", "1.model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "mesh, shape",
    [
        ({}, (8, 12)),
        ({"data": 2}, (4, 12)),
        ({"data": 2, "fsdp": 4}, (1, 12)),
        ({"fsdp": 2, "context": 3}, (4, 4)),
    ],
)
def test_a_device_has_its_part_of_rows_and_tokens(mesh, shape):
    with traced_on(AbstractMesh(tuple(mesh.values()), tuple(mesh)) if mesh else None):
        assert local_shape(8, 12) == shape


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_chunk_is_a_part_of_the_tokens_of_every_device(context, chunks):
    x = jnp.arange(2 * 12 * 2).reshape(2, 12, 2)
    with traced_on(AbstractMesh((2, context), ("data", "context"))):
        padded = pad_chunks(x, chunks, fill=-1)
        parts = cut_chunks(padded, chunks)
        joined = join_chunks(parts, 12)
    np.testing.assert_array_equal(joined, x)
    for part in parts:
        # Of each device's stretch of a row the same number of tokens, without padding.
        owners = [int(t) // 2 % 12 // (12 // context) for t in part[0, :, 0] if t >= 0]
        sizes = {owners.count(device) for device in range(context)}
        assert len(sizes) == 1 and sizes != {0}


@pytest.mark.parametrize(
    "mesh, message",
    [
        (
            {"data": 2, "fsdp": 2},
            "`batch_size`=6 must be a multiple of the 4 .* 8 would do",
        ),
        ({"tensor": 2}, "axes data, fsdp and context, got `tensor`"),
        ({"fsdp": 0}, "`fsdp` must be at least 1, got 0"),
    ],
)
def test_meshes_that_cannot_be_are_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        check_mesh(mesh, 6)
    check_mesh({"data": 2, "fsdp": 2}, 8)


def test_weights_that_fsdp_does_not_divide_are_named():
    mesh = AbstractMesh((3,), ("fsdp",))
    with pytest.raises(UserError, match="fsdp=3 does not divide .* of shape"):
        shard_step(arguments(batch_size=3), mesh)
