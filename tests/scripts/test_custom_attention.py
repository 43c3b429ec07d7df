import runpy
import sys

import pytest

from scripts import custom_attention

TEXT = "Once upon a time there was a little dog who liked to run. " * 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "."}, "exists and is not empty"),
        ({"model": "nowhere"}, "`nowhere` does not exist"),
        ({"steps": "0"}, "--steps must be at least 2"),
        ({"data": "nowhere.txt"}, "no file"),
    ],
)
def test_arguments_that_cannot_be_used_end_without_a_traceback(
    repository, llama_dir, tmp_path, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"model": llama_dir, "data": "text.txt", "output": "out", **change}
    words = [str(w) for name, value in options.items() for w in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["custom_attention.py", *words])
    script = str(repository / "scripts/custom_attention.py")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, None, "__main__")
    printed = str(stopped.value.code)  # on stderr, with status 1
    first, *more = printed.splitlines()
    assert first.startswith("custom_attention.py: ")
    # Several problems with the data, as with a model that has no tokenizer, are a list.
    assert all(line.startswith("- ") for line in more)
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_the_example_trains_saves_reloads_and_merges(shared_data, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    files = {"data": tmp_path / "text.txt", "output": tmp_path / "out"}
    sizes = {"steps": 4, "batch_size": 2, "max_length": 32}
    model = shared_data / "stories260K"
    args = custom_attention.Args(model=model, **files, **sizes)
    result = custom_attention.main(args)
    # 5 layers: r = 8 on q (64 -> 64) and v (64 -> 32), r = 4 on the gate (64 -> 64).
    plain, gate = 5 * 8 * (64 + 64 + 64 + 32), 5 * 4 * (64 + 64)
    assert result["trained_parameters_plain"] == plain
    assert result["of_which_gate_attn"] == gate
    assert result["trained_parameters_gated"] == plain + gate
    assert result["frozen_parameters_of_the_gate"] == 5 * 64 * 64
    assert result["step_ms_gated"] > 0
    # The gate starts at zero, so both start as the same model; then it moves.
    assert result["loss_gated"] != result["loss_plain"]
    assert result["reloaded_max_abs_difference"] <= 1e-5
    assert result["merged_max_abs_difference"] <= 3e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"base", "adapter", "merged"}
