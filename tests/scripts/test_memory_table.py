"""The table is made row by row, and continued after the last one."""

import json


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
    assert len(rows) == 13
    text = table.read_text()
    assert "estimated by formula" in text
    assert "| Llama 3.1 70B | 80 GB | 89,389 |" in text
    assert "| Llama 3.1 8B, no offload | 141 GB | | " in text
    assert "| save_matmuls |" in text
