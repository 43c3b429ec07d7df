"""Reading scheduled HLO: instructions, what runs how often, command buffers."""

import pytest

from qlora_jax.planning.hlo import (
    HOST_MEMORY,
    Array,
    executed,
    graph_comment,
    parse,
)
from qlora_jax.planning.traffic import count_transfers

PROGRAM = r"""HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}) }

%fused (p.0: f32[8], p.1: f32[]) -> f32[8] {
  %p.1 = f32[] parameter(1)
  %p.0 = f32[8]{0} parameter(0), metadata={op_name="step/p"}
  %b = f32[8]{0} broadcast(%p.1), dimensions={}
  ROOT %sum.1 = f32[8]{0} add(%p.0, %b), metadata={op_name="step/add"}
}

%small (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p.2)
}

%large (p.3: f32[8]) -> f32[8] {
  %p.3 = f32[8]{0} parameter(0)
  %copy.2 = f32[8]{0} copy(%p.3)
  ROOT %copy.3 = f32[8]{0} copy(%copy.2)
}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0:S(5)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %kernel = (f32[8]{0}, s8[64]{0}) custom-call(%x), custom_call_target="mosaic_gpu_v2", backend_config={module = "\22) {\00, to_apply=%no"}
  ROOT %t = (s32[], /*index=1*/f32[8]{0}) tuple(%i, %kernel)
}

%outer_body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %branch = f32[8]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
  ROOT %while.1 = (s32[], f32[8]{0}) while(%s.1), condition=%cond, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

%called (p.4: f32[8]) -> f32[8] {
  %p.4 = f32[8]{0} parameter(0)
  ROOT %f.2 = f32[8]{0} fusion(%p.4, %p.4), kind=kLoop, calls=%fused
}

%wrapped (p.5: f32[8]) -> f32[4] {
  ROOT %rs = f32[4]{0} reduce-scatter(f32[8]{0} %p.5), dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[8], c: f32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %c = f32[] constant(2)
  %f.1 = f32[8]{0} fusion(%a, %c), kind=kLoop, calls=%fused
  %while.2 = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%outer_body, backend_config={"known_trip_count":{"n":"2"}}
  %while.3 = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%inner_body
  %call.1 = f32[8]{0} call(%a), to_apply=%called
  %start = ((f32[8]{0}), f32[4]{0}) async-start(%a), calls=%wrapped
  %copy-start.1 = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%a)
  %copy-done.1 = f32[8]{0:S(5)} copy-done(%copy-start.1)
  ROOT %done = f32[4]{0} async-done(%start)
}
// command buffer: f.1 f.2
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return parse(PROGRAM)


def runs(calls) -> dict[str, int]:
    """Name -> how often it runs, of all calls of it."""
    total: dict[str, int] = {}
    for call in calls:
        name = call.instruction.name
        total[name] = total.get(name, 0) + call.times
    return total


def test_every_line_becomes_an_instruction(program):
    assert (program.module, program.entry) == ("jit_step", "main")
    lines = [line for line in PROGRAM.splitlines() if line.startswith("  ")]
    assert sum(len(c.instructions) for c in program.computations.values()) == len(lines)
    fused = program.computations["fused"]
    assert fused.root.name == "sum.1" and fused.root.op_name == "step/add"
    assert [o.name for o in fused.operands(fused.root)] == ["p.0", "b"]
    assert [i.number for i in fused.instructions.values()] == [1, 0, None, None]


def test_a_type_is_its_arrays_with_their_memory(program):
    state = program.computations["inner_body"].instructions["s"]
    assert state.results == (Array("s32", ()), Array("f32", (8,), HOST_MEMORY))
    assert state.bytes == 4 + 32
    kernel = program.computations["inner_body"].instructions["kernel"]
    assert [str(array) for array in kernel.results] == ["f32[8]", "s8[64]"]
    assert kernel.target == "mosaic_gpu_v2"


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("s4", 4), ("bf16", 16), ("f8e4m3fn", 8)]
)
def test_an_element_has_the_bits_of_its_dtype(dtype, bits):
    assert Array(dtype, (3, 2)).bytes == 6 * bits / 8


def test_loops_count_as_often_as_they_run_and_pairs_at_their_start(program):
    assert runs(executed(program)) == {
        "f.1": 1,
        "copy.1": 2,
        "copy.2": 2,
        "copy.3": 2,
        "kernel": 2 * 3 + 1,
        "f.2": 1,
        "rs": 1,
        "copy-start.1": 1,
    }
    seven = runs(executed(program, unknown_trips=7))
    assert seven["kernel"] == 2 * 3 + 7
    (inner, *_) = [c for c in executed(program) if c.instruction.name == "kernel"]
    assert [loop.name for loop in inner.loops] == ["while.2", "while.1"]


def test_of_a_conditional_the_largest_branch_runs(program):
    largest = runs(executed(program, weight=lambda call: 1.0))
    assert "copy.1" not in largest
    assert (largest["copy.2"], largest["copy.3"]) == (2, 2)


def test_a_collective_that_is_wrapped_is_counted(program):
    (transfer,) = count_transfers(program, 4, 4)
    assert (transfer.kind, transfer.count, transfer.bytes) == ("reduce-scatter", 1, 16)


def test_command_buffers_are_read_from_comments(program):
    assert program.graphs == (("f.1", "f.2"),)
    assert dict(program.in_graph) == {"f.1": 0, "f.2": 0}


SEQUENCE = """\
000: kCommandBuffer [source | next=003 (1)]
    001: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
    002: kCopy         [source | sink] kCopy
003: kWhile         [prev=000 (1) | sink]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion
  body:
    005: kCublasLtMatmul [source | sink] kCublasLtMatmul
    000: kCommandBuffer [source | sink]
        006: kCuDnn [source | sink] kCuDnn
    007: kAsyncDone [source | sink] async_id=9
"""
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
    f"    thunk_id: {number}\n  }}\n}}\n"
    for number, name in enumerate(
        ("add.1", "copy.5", "while.1", "compare", "gemm", "attention.2"), 1
    )
)


def test_command_buffers_are_those_of_the_compilers_schedule():
    text = graph_comment(SEQUENCE, METADATA)
    assert parse("ENTRY %m () -> f32[] {\n}" + text).graphs == (
        ("add.1", "copy.5"),
        ("attention.2",),
    )
    alone = SEQUENCE.replace("kCommandBuffer", "kSequential")
    assert graph_comment(alone, METADATA) == ""
