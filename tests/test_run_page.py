"""The page about a run: complete, self-contained, and every text escaped."""

import json
from html.parser import HTMLParser

import pytest

from qlora_jax.cli import main
from qlora_jax.errors import UserError
from qlora_jax.run_page import read_run, run_page

EVIL = "<script>alert('x')</script> & \"so\""


@pytest.fixture
def directory(tmp_path):
    """A run under way, with a hostile text in every place that has one."""
    run = tmp_path / "a <run>"
    run.mkdir()
    (run / "config.toml").write_text(f"# {EVIL}\n")
    rows = [
        {
            "step": step,
            "loss": 5 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "supervised_tokens": 10,
            "tokens_per_second": 100.0 * step,
            "seconds": 0.5,
            "peak_memory_bytes": 3_000_000_000,
            "mfu": 0.4,
        }
        for step in range(1, 21)
    ]
    for step, loss in ((5, 3.5), (10, 1.25), (15, 1.5)):
        rows.append(
            {"step": step, "eval_loss": loss, "eval_perplexity": 9.0, "eval_data": "d"}
        )
    # Measured on other data, before: not to be compared with.
    rows.append({"step": 1, "eval_loss": 0.1, "eval_perplexity": 1, "eval_data": "c"})
    rows.sort(key=lambda row: row["step"])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    samples = [
        {"step": step, "prompt": EVIL, "text": f" wrote {step} {EVIL}"}
        for step in (10, 20)
    ]
    text = "".join(json.dumps(row) + "\n" for row in samples)
    (run / "samples.jsonl").write_text(text)
    data = {
        "rows_read": 12,
        "examples": 11,
        "tokens": 110,
        "dropped": {EVIL: 1},
        "sources": [{"name": EVIL, "share": 0.5}],
        "fingerprint": "f" * 64,
    }
    started = {
        "planned_steps": 40,
        "trainable_parameters": 1000,
        "groups": {"q_proj": 750, EVIL: 250},
        "optimizer_groups": [
            {"name": "rest", "parameters": 750, "learning_rate": 2e-4},
            {"name": EVIL, "parameters": 250, "learning_rate": 5e-5, "weight_decay": 0},
        ],
        "continued_from": {"path": EVIL, "trainable_parameters_before": 900},
        "base_bytes": 5_000_000_000,
        "data": data,
        "held_out": {**data, "examples": 7},
        "plan": {"policy": EVIL, "device_bytes": {"base": 2_000_000_000, "loss": 0}},
        "versions": {"jax": "0.10"},
        "device": EVIL,
    }
    (run / "started.json").write_text(json.dumps(started))
    return run


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_a_run_under_way(directory):
    page = run_page(read_run(directory), None)
    read = Reader(page)
    text = " ".join(read.text)
    # Nothing from elsewhere, nothing that runs, and hostile texts are texts.
    assert not {"script", "link", "img", "iframe"} & set(read.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in read.attributes}
    assert text.count(EVIL) >= 11 and "a <run>" in text
    assert "step 20 of 40 when this was written" in text
    assert "1.2500" in text and "best held-out loss, step 10" in text
    assert "75.0%" in text and "2.00 GB" in text and "40.0%" in text
    assert text.index("wrote 20") < text.index("wrote 10")
    assert read.tags.count("svg") == 6
    assert "device bytes: loss" not in text
    # A field that one group has and another has not.
    assert "learning rate" in text and "5e-05" in text and "0.0002" in text
    assert "continued from: trainable parameters before" in text


def test_a_finished_run_and_one_that_has_not_begun(directory):
    files = read_run(directory)
    page = run_page(files, {"steps": 20, "stopped_early": None})
    assert "Finished after 20 steps." in page
    early = run_page(files, {"steps": 20, "stopped_early": f"because {EVIL}"})
    assert "Ended early after step 20 of 40: because &lt;script&gt;" in early
    for name in ("metrics.jsonl", "samples.jsonl", "started.json"):
        (directory / name).unlink()
    assert "No step has been taken yet." in run_page(read_run(directory), None)


def test_the_command(directory, tmp_path, capsys):
    assert main(["report", str(directory), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(directory / "report.html")
    assert (told["step"], told["best_step"], told["best_loss"]) == (20, 10, 1.25)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    other = tmp_path / "other.html"
    assert main(["report", str(directory), "--output", str(other)]) == 0
    assert other.read_text() == page
    assert main(["report", str(tmp_path)]) == 1
    assert "is no run directory" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no config\.toml"):
        read_run(tmp_path)
    no_folder = tmp_path / "none" / "page.html"
    assert main(["report", str(directory), "--output", str(no_folder)]) == 1
    assert "cannot be written: No such file" in capsys.readouterr().err
