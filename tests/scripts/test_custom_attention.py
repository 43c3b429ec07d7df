import runpy

import pytest

TEXT = "Once upon a time there was a little dog who liked to run. " * 60


@pytest.fixture
def result(repository, shared_data, tmp_path):
    """What the script returns after a few steps on a real model."""
    (tmp_path / "text.txt").write_text(TEXT)
    script = str(repository / "scripts/custom_attention.py")
    module = runpy.run_path(script)
    args = module["Args"](
        model=shared_data / "stories260K",
        data=tmp_path / "text.txt",
        output=tmp_path / "out",
        steps=4,
        batch_size=2,
        max_length=32,
    )
    return module["main"](args)


def test_the_example_trains_saves_reloads_and_merges(result, tmp_path):
    # 5 layers: r = 8 on q (64 -> 64) and v (64 -> 32), r = 4 on the gate (64 -> 64).
    assert result["trained_parameters_plain"] == 5 * 8 * (64 + 64 + 64 + 32)
    assert result["of_which_gate_attn"] == 5 * 4 * (64 + 64)
    assert (
        result["trained_parameters_gated"]
        == result["trained_parameters_plain"] + result["of_which_gate_attn"]
    )
    assert result["frozen_parameters_of_the_gate"] == 5 * 64 * 64
    assert result["step_ms_gated"] > 0
    # The gate starts at zero, so both start as the same model; then it moves.
    assert result["loss_gated"] != result["loss_plain"]
    assert result["reloaded_max_abs_difference"] <= 1e-5
    assert result["merged_max_abs_difference"] <= 3e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"base", "adapter", "merged"}
