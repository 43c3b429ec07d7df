"""What a kernel of a compiled program is counted to read and write."""

from scripts.decode_table import traffic

# A key is written into the cache; scores read one layer of it, with the new key.
UPDATE = """
%param_0 = bf16[32,8,64]{2,1,0} parameter(0)
%param_1 = bf16[1,1,64]{2,1,0} parameter(1)
%param_2 = s32[] parameter(2)
%dus = bf16[32,8,64]{2,1,0} dynamic-update-slice(%param_0, %param_1, %param_2)
"""
CACHE = UPDATE + "ROOT %bitcast = bf16[32,8,64]{2,1,0} bitcast(%dus)"
SCORES = (
    UPDATE
    + """
%layer = bf16[1,8,64]{2,1,0} dynamic-slice(%dus, %param_2), dynamic_slice_sizes={1,8,64}
ROOT %reduce = f32[8]{0} reduce(%layer, %zero), dimensions={0,2}
"""
)
TABLE = """
%param_0 = bf16[1000,64]{1,0} parameter(0)
%param_1 = s32[2]{0} parameter(1)
ROOT %gather = bf16[2,64]{1,0} gather(%param_0, %param_1), offset_dims={1}
"""
ARGUMENTS = [
    "%cache = bf16[32,8,64]{2,1,0} get-tuple-element(%state), index=0",
    "%key = bf16[1,1,64]{2,1,0} get-tuple-element(%state), index=1",
    "%number = s32[] get-tuple-element(%state), index=2",
    "%table = bf16[1000,64]{1,0} get-tuple-element(%state), index=3",
    "%tokens = s32[2]{0} get-tuple-element(%state), index=4",
    "%codes = u8[32,128,32]{2,1,0} get-tuple-element(%state), index=5",
]


def count(line: str, fused: str = "") -> float:
    (size,) = traffic([*ARGUMENTS, line], {"fused": fused.strip().splitlines()}, 32)
    return size


def test_an_update_in_place_reads_and_writes_what_is_new():
    fusion = "fusion(%cache, %key, %number), kind=kLoop, calls=%fused"
    assert count(f"%a = bf16[32,8,64]{{2,1,0}} {fusion}", CACHE) == 2 * 128 + 4


def test_a_slice_is_read_once_even_of_an_updated_stack():
    fusion = "fusion(%cache, %key, %number), kind=kInput, calls=%fused"
    assert count(f"%a = f32[8]{{0}} {fusion}", SCORES) == 2 * 8 * 64 + 128 + 4 + 32


def test_of_a_table_the_rows_that_are_looked_up_count():
    fusion = "fusion(%table, %tokens), kind=kLoop, calls=%fused"
    assert count(f"%a = bf16[2,64]{{1,0}} {fusion}", TABLE) == 256 + 8 + 256


def test_our_kernels_read_one_layer_of_a_stack_and_update_the_cache_in_place():
    call = 'custom-call(%codes, %key, %cache), custom_call_target="mosaic_gpu_v2"'
    reads = 128 * 32 + 128 + 2 * 8 * 64
    assert count(f"%a = f32[2,128]{{1,0}} {call}") == reads + 4 * 256
    aliased = f"{call}, output_to_operand_aliasing={{{{1}}: (2, {{}})}}"
    result = "(f32[2,128]{1,0}, bf16[32,8,64]{2,1,0})"
    assert count(f"%a = {result} {aliased}") == reads + 4 * 256
