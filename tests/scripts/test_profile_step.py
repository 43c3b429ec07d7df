"""scripts/profile_step on a saved program: tables, files, a trace."""

import importlib
import json

import pytest

from qlora_jax.planning import categories
from scripts.profile_step import output, program
from tests.models.reference import CONFIG
from tests.planning.programs import FORWARD, TWO, event, write_trace

main = importlib.import_module("scripts.profile_step.__main__").main

CHOSEN = {
    **{"model": "small", "config": CONFIG.to_hf(), "gpu": "rtx-4090", "batch": 2},
    **{"length": 128, "accumulate": 3, "rank": 16, "alpha": 32, "packed": False},
    **{"remat": "full", "scan_layers": True, "attention": "auto", "kernels": "auto"},
    **{"lora_products": "auto", "norms": "fused", "activation": "auto"},
    **{"mesh": {}, "decode": 0, "jax": "0.0"},
}


@pytest.fixture
def saved(tmp_path):
    """A program as --save writes it: three products in a loop, and a copy."""
    path = tmp_path / "program.txt"
    program.save_program(path, CHOSEN, TWO)
    return path


def test_a_saved_program_is_counted_and_its_report_is_printed_again(
    saved, tmp_path, capsys
):
    report = tmp_path / "report.json"
    main(["--program", str(saved), "--json", str(report)])
    printed = capsys.readouterr().out
    assert "small on rtx-4090, 2 x 128 tokens, r=16, full" in printed
    assert "kernels auto, norms fused, 3 micro-batches" in printed
    assert "counted from the compiled program, not measured" in printed
    counted = json.loads(report.read_text())
    assert counted["settings"] == CHOSEN
    assert counted["tokens"] == 2 * 128 * 3
    rate = counted["reachable"]["tokens_per_second"]
    assert f"{rate:,.0f} tokens/s" in printed
    main(["--report", str(report)])
    assert capsys.readouterr().out == printed
    main(["--report", str(report), "--markdown"])
    rows = capsys.readouterr().out.splitlines()
    # A header, a rule, the categories, launches and the total.
    assert len(rows) == 2 + len(counted["categories"]) + 2


def test_two_counts_are_compared(saved, tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    main(["--program", str(saved), "--json", str(before)])
    program.save_program(saved, CHOSEN, TWO.replace('"n":"3"', '"n":"1"'))
    main(["--program", str(saved), "--json", str(after)])
    old, new = (json.loads(path.read_text()) for path in (before, after))
    rows = output.compare_rows(old, new)
    # What shrank most first; a category that is gone counts as 0.
    seconds = [each["reachable"]["seconds"] for each in (old, new)]
    assert rows[-1][0] == "total"
    assert float(rows[-1][3]) == pytest.approx(
        1e3 * (seconds[1] - seconds[0]), abs=0.01
    )
    capsys.readouterr()
    main(["--report", str(after), "--compare", str(before)])
    assert "before: small on rtx-4090" in capsys.readouterr().out
    gone = {**new, "categories": {}}
    assert all(float(row[2]) == 0 for row in output.compare_rows(old, gone)[:-2])


def test_kernels_are_listed_by_time_and_in_order(saved, capsys):
    main(["--program", str(saved), "--top", "1", "--by-layer", "forward", "step"])
    printed = capsys.readouterr().out
    top, forward, step = printed.split("\n\nthe 1 kernels")[1].split("kernels of `")
    assert "bf16[256,1536] x bf16[1536,512] -> bf16[256,512]" in top
    assert "down_proj/dot" in forward and "f32[4096]" not in forward
    assert "f32[4096]" in step


def test_the_table_is_drawn(saved, tmp_path):
    picture = tmp_path / "step.png"
    main(["--program", str(saved), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_put_next_to_the_count(saved, tmp_path, capsys):
    trace, report = tmp_path / "trace", tmp_path / "report.json"
    # Two steps of three iterations.
    events = 6 * [event("gemm", 500, "k")] + 2 * [event("copy", 10, "c")]
    write_trace(trace, [*events, event("mystery", 40)])
    main(["--program", str(saved), "--trace", str(trace), "--json", str(report)])
    printed = capsys.readouterr().out
    assert "measured, mean of 2 steps" in printed
    assert "not in the program: 0.020 ms mystery" in printed
    rows = json.loads(report.read_text())["measured"]["rows"]
    of_products = [n for n in rows if n.startswith((categories.BASE, categories.LORA))]
    assert rows[of_products[0]]["seconds"] == pytest.approx(3 * 5e-4)


def test_a_token_of_generation_has_the_floor_of_its_weights(tmp_path, capsys):
    path = tmp_path / "program.txt"
    text = TWO.replace(FORWARD, "jit(_generate)/while")
    program.save_program(path, {**CHOSEN, "decode": 8, "accumulate": 1}, text)
    report = tmp_path / "report.json"
    main(["--program", str(path), "--json", str(report)])
    assert "a token of generation, 2 rows after 128" in capsys.readouterr().out
    counted = json.loads(report.read_text())
    # The loop over tokens; what runs before it is not a token's.
    assert (counted["tokens"], counted["launches"]) == (2, 3)
    assert counted["necessary_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--program", "FOLDER/nowhere.txt"], "cannot be read"),
        (["--program", "FOLDER/plain.txt"], "was not written by --save"),
        (["--model", "FOLDER/nowhere"], "expected one of 1b, 3b, 8b"),
        (["--report", "FOLDER/plain.txt"], "was not written by --json"),
        (["--report", "FOLDER/report.json", "--top", "3"], "--report has no kernels"),
        (["--report", "FOLDER/report.json", "--page", "FOLDER/plain.txt"], "no lines"),
        (["--program", "FOLDER/program.txt", "--page", "x.md"], "--page needs --json"),
        (["--program", "FOLDER/cut.txt"], "first line of .* is damaged"),
        (["--program", "FOLDER/list.txt"], "first line of .* is damaged"),
        (["--program", "FOLDER/bytes.txt"], "cannot be read"),
        (
            ["--program", "FOLDER/older.txt"],
            "does not say .*: jax, norms. Save it anew",
        ),
        (["--program", "FOLDER/half.txt"], "has no whole program"),
        (["--model", "FOLDER/cut.txt"], "not valid JSON"),
        (["--decode", "-3"], "--decode must be at least 1, got -3"),
        (["--decode", "8", "--packed", "--fsdp", "2"], "--packed, --fsdp: with --dec"),
        (["--decode", "8", "--remat", "save_matmuls"], "--remat: with --decode"),
    ],
)
def test_what_cannot_be_used_is_refused(
    arguments, message, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "scripts.profile_step.__main__.find_compiler", lambda python: "python"
    )
    (tmp_path / "plain.txt").write_text("HloModule f\n")
    older = {k: v for k, v in CHOSEN.items() if k not in ("jax", "norms")}
    for name, header in (
        ("cut", '{"model": '),
        ("list", "[]"),
        ("older", json.dumps(older)),
        ("half", json.dumps(CHOSEN)),
    ):
        (tmp_path / f"{name}.txt").write_text(f"// qlora-jax: {header}\nHloModule f\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    main(["--program", str(saved), "--json", str(tmp_path / "report.json")])
    arguments = [a.replace("FOLDER", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_a_table_is_replaced_in_a_page(saved, tmp_path):
    page, report = tmp_path / "page.md", tmp_path / "mine.json"
    page.write_text("a\n<!-- mine -->\nold\n<!-- /mine -->\nb\n")
    main(["--program", str(saved), "--json", str(report), "--page", str(page)])
    table = output.markdown(json.loads(report.read_text()))
    expected = f"a\n<!-- mine -->\n\n{table}\n\n<!-- /mine -->\nb\n"
    assert page.read_text() == expected
    main(["--report", str(report), "--page", str(page)])
    assert page.read_text() == expected


def test_the_page_has_the_tables_on_record(repository):
    page = (repository / "docs/step_time.md").read_text()
    for remat in ("full", "save_matmuls"):
        record = repository / f"tests/compile/step_8b_{remat}.json"
        assert output.markdown(json.loads(record.read_text())) in page
