from qlora_jax.planning.hlo import collectives, parse

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


def test_collectives_in_a_loop_count_once_per_iteration():
    assert collectives(parse(PROGRAM)) == {
        "all-gather": {"count": 32, "bytes": 32 * 2 * 8 * 4},
        "reduce-scatter": {"count": 1, "bytes": 16},
        "all-reduce": {"count": 1, "bytes": 4},
    }


def test_a_program_of_one_device_has_none():
    text = "ENTRY %main (p: f32[2]) -> f32[2] {\n  %p\n}\n"
    assert collectives(parse(text)) == {}
