"""scripts/bench commands: a user's commands on a checkpoint, measured and checked."""

import json
import subprocess
import sys

import pytest

from scripts.bench import commands

SMALL = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
}


@pytest.mark.slow
def test_every_command_is_measured_and_its_result_checked(repository, tmp_path):
    config, output = tmp_path / "config.json", tmp_path / "commands.json"
    config.write_text(json.dumps(SMALL))
    # In a small process: a child's peak begins with the memory of its parent.
    words = [sys.executable, "-m", "scripts.bench", "commands", str(config)]
    words += ["--output", str(output)]
    done = subprocess.run(words, cwd=repository, check=True, capture_output=True)
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 5
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["written_gb"] > 0
        # Python and jax alone; nothing of this size needs a gigabyte.
        assert 0.05 < row["peak_gb"] < 1.5
    checks = report["checks"]
    assert checks["embeddings_equal"] and checks["rank"] == 16
    assert len(checks["largest_relative_difference"]) == 4
    # Updates that are rounded away would make the comparison empty.
    assert min(checks["largest_update_over_largest_weight"].values()) > 0.01
    assert b"export the adapter" in done.stdout


def test_a_command_that_fails_ends_with_what_it_said(tmp_path):
    with pytest.raises(SystemExit, match="(?s)failed:.*no command 'quantise'"):
        commands.run("quantise", "qlora_jax.cli", "quantise", made=tmp_path)


def test_the_committed_results_are_those_of_qwen3(repository):
    report = json.loads((repository / "benchmarks/commands.json").read_text())
    assert report["model"] == commands.QWEN3
    checks, page = report["checks"], (repository / "docs/benchmarks.md").read_text()
    # Half an ulp of bfloat16.
    assert max(checks["largest_relative_difference"].values()) <= 2.0**-8
    # Four bits, an 8-bit scale for 64 weights, a float32 for 256 of those; embeddings
    # in 16 bits.
    weights = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    packed = weights * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * 151936 * 1024
    assert checks["bytes"]["model-nf4"] == pytest.approx(packed, rel=1e-2)
    assert checks["bytes"]["merged"] == pytest.approx(checks["bytes"]["model"], 1e-3)
    assert commands.markdown(report) in page
