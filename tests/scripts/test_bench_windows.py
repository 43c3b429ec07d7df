"""scripts/bench windows: what a window saves, and the counts of a scheduled program."""

import json

import pytest

from pallas_kernels.device import jax_has_kernels
from scripts.bench import windows
from scripts.bench.program import count_work

PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8,4], p.1: f32[4,2]) -> f32[8,2] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = f32[4,2]{1,0} parameter(1)
  ROOT %dot.0 = f32[8,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %gemm = (bf16[8,16]{1,0}, s8[64]{0}) custom-call(%x, %x), \
custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}
  %y = bf16[8,16]{1,0} get-tuple-element(%gemm), index=0
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %y)
}

%condition (s: (s32[], bf16[8,16])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[8,4], b: f32[4,2], c: (s32[], bf16[8,16])) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %c = (s32[], /*index=1*/bf16[8,16]{1,0}) parameter(2)
  %w = (s32[], bf16[8,16]{1,0}) while(%c), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %f = f32[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused
}
"""


def test_what_a_loop_runs_counts_as_often_as_it_runs():
    work = count_work(PROGRAM)
    # A fusion, and three times a product of cuBLAS.
    assert work.kernels == 1 + 3
    assert work.product_flops == 2 * 8 * 4 * 2 + 3 * 2 * 8 * 16 * 16
    arrays = 4 * (8 * 4 + 4 * 2 + 8 * 2)
    assert work.bytes == arrays + 3 * (3 * 2 * 8 * 16 + 64)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"known_trip_count":{"n":"3"}', "", "how often w runs is not known"),
        (" fusion(%a, %b), kind=kCustom", " conditional(%a, %b)", "f branches"),
    ],
)
def test_work_that_depends_on_data_is_not_guessed(old, new, message):
    with pytest.raises(ValueError, match=message):
        count_work(PROGRAM.replace(old, new))


def test_pairs_that_are_seen():
    assert windows.visible(4, None) == 1 + 2 + 3 + 4
    assert windows.visible(4, 2) == 1 + 2 + 2 + 2
    assert windows.visible(4, 9) == windows.visible(4, None)


@pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11")
def test_our_kernels_visit_the_blocks_of_the_window():
    full, within = (windows.pallas_flops(4096, size) for size in (None, 512))
    # Blocks of 128 queries by 128 keys: 32 rows of them, up to the diagonal; with the
    # window the diagonal and four before it.
    assert full["forward"] == 4 * 128**3 * 32 * (32 * 33 // 2)
    assert within["forward"] == 4 * 128**3 * 32 * (1 + 2 + 3 + 4 + 28 * 5)


def test_times_and_operations_become_a_table(monkeypatch, tmp_path, capsys):
    row = {"implementation": "xla", "pass": "forward", "full": 4e9, "window": 1e9}
    operations = {"jax": "0.0", "rows": [row | {"ratio": 0.25}]}
    monkeypatch.setattr(windows, "run_json", lambda command: operations)
    monkeypatch.setattr(windows, "find_compiler", lambda python: "python")
    output = tmp_path / "windows.json"
    sizes = ["--length", "64", "--window", "16", "--repeats", "2"]
    windows.main([*sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    assert [row["what"] for row in result["times"]] == [
        *("attention, forward", "attention, forward and backward", "training step")
    ]
    for row in result["times"]:
        assert len(row["full_s"]) == len(row["window_s"]) == 2
        ratios = [w / f for w, f in zip(row["window_s"], row["full_s"], strict=True)]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)  # the median of two
    printed = capsys.readouterr().out
    assert "| attention `xla`, forward | 4 GFLOP | 1 GFLOP | 0.25 |" in printed
    windows.main(["--markdown", str(output)])
    assert capsys.readouterr().out in printed


def test_the_page_has_the_table_of_the_committed_results(repository):
    result = json.loads((repository / "benchmarks/windows.json").read_text())
    page = (repository / "docs/models.md").read_text()
    assert windows.markdown(result) in page
