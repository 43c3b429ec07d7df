"""The table is made row by row, and continued after the last one."""

import json
import re


def test_the_table_is_made_and_continued(run_script, repository, tmp_path):
    output, table = tmp_path / "memory.json", tmp_path / "memory.md"

    def run(*args):
        options = ("--output", output, "--estimate", *args)
        done = run_script("memory_table.py", *options, cwd=repository)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--only", "8b 8 GB")
    (first,) = json.loads(output.read_text())["rows"].values()
    assert first["fits"]
    assert first["published"] == 2972
    assert first["device_bytes"]["total"] <= 8e9
    assert first["max_length"] > 2972

    printed = run("--markdown", str(table))
    assert "8b 8 GB any" not in printed  # made before
    rows = json.loads(output.read_text())["rows"]
    assert rows["8b 8 GB any"] == first
    assert len(rows) == 15 + 4 * 7
    text = table.read_text()
    assert "estimated by formula" in text
    assert "| Llama 3.1 70B | 80 GB | 89,389 |" in text
    assert "| Llama 3.1 8B, no offload | 141 GB | | " in text
    assert "| save_matmuls |" in text
    # Other families in a table of their own, with Llama beside.
    assert "| model | 8 GB | 12 GB | 16 GB | 24 GB | 40 GB | 48 GB | 80 GB |" in text
    length = f"{first['max_length']:,}"
    assert f"| Llama 3.1 8B | {length} | " in text
    # Gemma 2 does not fit 8 GB under any policy.
    assert not rows["gemma-2-9b 8 GB any"]["fits"]
    assert re.search(r"^\| gemma-2-9b \| none \| [\d,]+ \|", text, re.M)


def test_the_formula_is_near_the_compiled_plans_of_every_family(repository):
    stored = json.loads((repository / "benchmarks/memory_8b.json").read_text())
    rows = [row for row in stored["rows"].values() if "estimated_bytes" in row]
    assert {row["model"] for row in rows} >= {"Qwen3-8B", "gemma-2-9b"}
    for row in rows:
        if row["max_length"] > 500_000:
            # From 2^31 elements of an array on, the compiler fuses otherwise, and the
            # formula follows Llama's plans.
            continue
        error = row["estimated_bytes"] / row["device_bytes"]["total"] - 1
        # As docs/memory.md promises of the formula.
        assert row["method"] == "compiled" and abs(error) < 0.1, (row["model"], error)
