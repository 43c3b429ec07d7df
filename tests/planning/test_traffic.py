import dataclasses

import pytest

from qlora_jax.planning import hlo
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.traffic import (
    PEAK_SHARE,
    Transfer,
    Work,
    bytes_by_kind,
    count_transfers,
    replica_groups,
    time_step,
)

H200 = CARDS["h200"]

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (arg.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %ag = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(bf16[2,4]{1,0} %x), dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done((bf16[2,4]{1,0}, bf16[8,4]{1,0}) %ag)
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%i, %done)
}

%cond (arg.2: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%wrapped (p: f32[16]) -> f32[4] {
  ROOT %rs = f32[4]{0} reduce-scatter(f32[16]{0} %p), dimensions={0}, to_apply=%add
}

ENTRY %main (p0: bf16[2,4]) -> f32[] {
  %loop = (s32[], bf16[8,4]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %a = ((f32[16]{0}), f32[4]{0}) async-start(f32[16]{0} %g), calls=%wrapped
  %b = f32[4]{0} async-done(%a)
  ROOT %sum = f32[] all-reduce(f32[] %l), to_apply=%add
}
"""  # noqa: E501


def collective(groups: str) -> hlo.Instruction:
    line = f"  %x = f32[4]{{0}} all-reduce(f32[4]{{0}} %y), {groups}, to_apply=%add"
    text = f"ENTRY %m (a: f32[]) -> f32[] {{\n{line}\n}}\n"
    return hlo.parse(text).computations["m"].instructions["x"]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=[1,4]<=[4]", [(0, 1, 2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['d'=2,'f'=2] {'d','f'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['fsdp'=4] {'fsdp':(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['fsdp'=4] {'fsdp':(1)2}", [(0, 2), (1, 3)]),
        ("channel_id=1", [(0, 1, 2, 3)]),
    ],
)
def test_replica_groups_are_read(text, groups):
    assert replica_groups(collective(text), 4) == groups


@pytest.mark.parametrize(
    ("groups", "members", "nodes"),
    [
        ("replica_groups=[8,8]<=[64]", 8, 1),
        ("replica_groups=[8,8]<=[8,8]T(1,0)", 8, 8),
        ("replica_groups=[1,64]<=[64]", 64, 8),
        ("replica_groups=[4,16]<=[64]", 16, 2),
    ],
)
def test_a_group_that_spans_nodes_sends_between_them(groups, members, nodes):
    line = f"  %x = f32[4]{{0}} all-reduce(f32[4]{{0}} %y), {groups}, to_apply=%add"
    program = hlo.parse(f"ENTRY %m (a: f32[]) -> f32[] {{\n{line}\n}}\n")
    (transfer,) = count_transfers(program, 64, 8)
    assert (transfer.members, transfer.nodes, transfer.bytes) == (members, nodes, 16)
    assert (transfer.network_bytes > 0) == (nodes > 1)
    sent = transfer.node_bytes + transfer.network_bytes
    assert sent == pytest.approx(2 * 16 * (members - 1) / members)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 7 / 8), ("reduce-scatter", 7), ("all-reduce", 14 / 8)],
)
def test_a_ring_sends_what_its_kind_needs(kind, sent):
    whole = Transfer(kind, "step", 1, 1e9, members=8)
    assert whole.sent == sent * 1e9
    assert whole.network_bytes == 0
    # Of two nodes of four, each card of a node sends a quarter of it to the other.
    across = dataclasses.replace(whole, nodes=2)
    assert across.network_bytes == sent * 1e9 / 4
    assert across.sent == whole.sent
    # One card of each node: all of it.
    assert dataclasses.replace(whole, nodes=8).node_bytes == 0


def test_only_what_outlasts_the_kernels_of_its_pass_is_added():
    rate = PEAK_SHARE * H200.flops
    work = Work(forward=rate, backward=3 * rate, other=rate, tokens=1000)
    # 450 GB/s in a node; each GPU sends 7 / 8 of the result.
    second = 450e9 * 8 / 7

    def exposed(*parts):
        transfers = [Transfer("all-gather", p, 1, n * second, 8) for p, n in parts]
        return time_step(work, transfers, H200)["exposed_seconds"]

    assert exposed(("forward", 1.0)) == 0
    assert exposed(("forward", 1.5)) == pytest.approx(0.5)
    assert exposed(("backward", 2.5)) == 0
    assert exposed(("backward", 3.5), ("forward", 0.5)) == pytest.approx(0.5)
    assert exposed(("step", 0.25)) == pytest.approx(0.25)
    result = time_step(work, [Transfer("all-gather", "step", 1, second, 8)], H200)
    assert result["seconds"] == pytest.approx(6)
    assert result["tokens_per_second"] == pytest.approx(1000 / 6)
    assert result["exposed_share"] == pytest.approx(1 / 6)
    slow = dataclasses.replace(work, host_seconds=60)
    assert time_step(slow, [], H200)["seconds"] == 60


def test_bytes_are_summed_by_kind():
    gathers = [Transfer("all-gather", p, 2, 80.0, 8) for p in ("forward", "backward")]
    assert bytes_by_kind(gathers) == {
        "all-gather": {"count": 4, "bytes": 160, "node_bytes": 140, "network_bytes": 0}
    }


def test_collectives_in_a_loop_count_once_per_iteration():
    counted = bytes_by_kind(count_transfers(hlo.parse(PROGRAM), 4, 4))
    assert {kind: (row["count"], row["bytes"]) for kind, row in counted.items()} == {
        "all-gather": (32, 32 * 2 * 8 * 4),
        "reduce-scatter": (1, 16),
        "all-reduce": (1, 4),
    }
