"""Profiler traces: events of a device become rows by category."""

import gzip

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.errors import UserError
from qlora_jax.planning import categories, hlo, trace
from qlora_jax.planning.work import count_kernels
from tests.planning.programs import FORWARD, SIZES, event, write_trace

PROGRAM = f"""
%add_1 (p: f32[256]) -> f32[256] {{
  %p = f32[2,128,512]{{2,1,0}} parameter(0)
  ROOT %r = f32[2,128,512]{{2,1,0}} add(%p, %p)
}}

%body (s: f32[]) -> f32[] {{
  %x = bf16[256,1536]{{1,0}} parameter(0)
  %w = bf16[1536,512]{{1,0}} parameter(1)
  %custom-call.3 = (bf16[256,512]{{1,0}}, s8[64]{{0}}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={{op_name="layers/down_proj/dot"}}, backend_config={{"lhs_contracting_dimensions":["1"]}}
  %loop_add_fusion.7 = f32[2,128,512]{{2,1,0}} fusion(%x), kind=kLoop, calls=%add_1, metadata={{op_name="layers/input_layernorm/mul" deduplicated_name="loop_add_fusion.2"}}
  ROOT %loop_add_fusion.8 = f32[2,128,512]{{2,1,0}} fusion(%x), kind=kLoop, calls=%add_1, metadata={{op_name="layers/add" deduplicated_name="loop_add_fusion.2"}}
}}

ENTRY %m (a: f32[]) -> f32[] {{
  ROOT %while.1 = f32[] while(%s), body=%body, metadata={{op_name="{FORWARD}"}}, backend_config={{"known_trip_count":{{"n":"4"}}}}
}}
"""  # noqa: E501
NORM, SUMS, BASE = (
    f"{name}, forward" for name in (categories.NORM, categories.SUMS, categories.BASE)
)


@pytest.fixture(scope="module")
def kernels():
    return count_kernels(hlo.parse(PROGRAM), SIZES)


def measured(folder, kernels, events, **options):
    write_trace(folder, events)
    return trace.attribute(trace.read_trace(folder), kernels, SIZES, **options)


def test_events_are_those_of_the_instruction_that_they_name(tmp_path, kernels):
    # Two steps of four layers.
    events = 8 * [
        event("nvjet_tst_128x256", 100, "custom-call.3"),
        event("loop_add_fusion_2", 10, "loop_add_fusion.7"),
        event("loop_add_fusion_2", 30, "loop_add_fusion.8"),
        # The same again, as a row of the profiler's own.
        event("loop_add_fusion.8", 30, "loop_add_fusion.8", tid=8),
    ]
    result = measured(tmp_path, kernels, events, module="jit_f")
    assert result.steps == 2
    seconds = {name: row.seconds for name, row in result.rows.items()}
    assert seconds == pytest.approx({BASE: 4e-4, SUMS: 1.2e-4, NORM: 4e-5})
    assert [row.launches for row in result.rows.values()] == [4, 4, 4]
    assert result.seconds == pytest.approx(5.6e-4)
    assert not result.unknown


def test_kernels_of_a_command_buffer_are_found_by_their_names(tmp_path, kernels):
    events = 4 * [
        event("nvjet_tst_128x256", 100, "command_buffer_1"),
        event("cudnn_sm90_flash_fprop", 50, "command_buffer_1"),
        # Two fusions of one form, which the name does not tell apart: they move as
        # much, so each gets half.
        event("loop_add_fusion_2", 10, "command_buffer_1"),
        event("something_else", 3, "command_buffer_1"),
    ]
    result = measured(tmp_path, kernels, events, steps=1)
    seconds = {name: row.seconds for name, row in result.rows.items()}
    assert seconds == pytest.approx(
        {
            trace.LIBRARY_PRODUCTS: 4e-4,
            trace.LIBRARY_ATTENTION: 2e-4,
            NORM: 2e-5,
            SUMS: 2e-5,
            trace.UNKNOWN: 1.2e-5,
        }
    )
    assert result.unknown == pytest.approx({"something_else": 1.2e-5})


def test_other_programs_are_left_out(tmp_path, kernels):
    other = event("loop_add_fusion_2", 10, "loop_add_fusion.7")
    other["args"]["hlo_module"] = "jit_evaluate"
    mine = event("loop_add_fusion_2", 5, "loop_add_fusion.7")
    result = measured(tmp_path, kernels, [other, mine], module="jit_f", steps=1)
    assert result.seconds == pytest.approx(5e-6)


def test_a_trace_of_a_cpu_is_read(tmp_path):
    """A real one: what the profiler of this jax writes."""

    @jax.jit
    def f(x):
        return jnp.sin(x @ x) + 1

    x = jnp.ones((256, 256))
    compiled = f.lower(x).compile()
    compiled(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            compiled(x).block_until_ready()
    kernels = count_kernels(hlo.parse(compiled.as_text()), SIZES)
    events = trace.read_trace(tmp_path)
    names = {event.hlo_op for event in events}
    assert names & {k.instruction.name for k in kernels}
    result = trace.attribute(events, kernels, SIZES, module="jit_f")
    assert result.steps == 3
    assert 0 < result.seconds < 10


@pytest.mark.parametrize("content", [None, b"{", b'{"a": 1}'])
def test_what_is_no_trace_is_refused(tmp_path, content):
    if content is not None:
        with gzip.open(tmp_path / "a.trace.json.gz", "wb") as file:
            file.write(content)
    with pytest.raises(UserError, match="trace"):
        trace.read_trace(tmp_path)
