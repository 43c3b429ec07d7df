"""The table of many GPUs is made by formula, and kept rows are not made again."""

import json


def test_the_table_is_made_by_formula_and_continued(run_script, repository, tmp_path):
    output, table = tmp_path / "many.json", tmp_path / "many.md"
    kept = json.loads((repository / "benchmarks" / "many_devices.json").read_text())
    rows = kept["rows"]
    # One row is missing, and the others are compiled or made already.
    del rows["8b on 512"]
    output.write_text(json.dumps({"rows": rows}))
    done = run_script(
        "many_devices_table.py",
        *("--output", output, "--markdown", table),
        cwd=repository,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text())["rows"]
    assert made["8b on 512"]["estimate"]["mesh"] == {"data": 512}
    assert {name: row for name, row in made.items() if name in rows} == rows
    text = table.read_text()
    assert text.count("| 405B | 8 |") == 2
    # A step of 8B with tensor parallelism: six sums of [65,536, 4,096] in each layer.
    assert f"{6 * 32 * 2 * 7 / 8 * 65536 * 4096 * 2 / 1e9:,.2f} GB |" in text


def test_405b_fits_one_node_of_eight_as_compiled(repository):
    rows = json.loads((repository / "benchmarks" / "many_devices.json").read_text())
    row = rows["rows"]["405b on 8, fsdp 8"]["compiled"]
    assert row["method"] == "compiled"
    assert row["mesh"] == {"fsdp": 8}
    assert row["fits"]
    assert row["device_bytes"]["total"] < 80e9
