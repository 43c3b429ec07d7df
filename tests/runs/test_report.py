"""The report of a run: complete, self-contained, and every string escaped."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jinja2
import pytest

from qlora_jax.cli.main import main
from qlora_jax.errors import UserError
from qlora_jax.runs.report import read_run, render_page, render_run

EVIL = "<script>alert('x')</script> & \"so\""
# Right-to-left override, escape, NUL, a lone surrogate, line separator.
HIDDEN = "\u202e\x1b\x00\ud800\u2028"
SHOWN = "[U+202E][U+001B][U+0000][U+D800][U+2028]"


@pytest.fixture
def directory(tmp_path):
    """A run that is not complete, with a hostile string wherever there is a string."""
    run = tmp_path / "a <run>"
    (run / "adapter").mkdir(parents=True)
    (run / "config.toml").write_text(f"# {EVIL}\n")
    always = {"grad_norm": 1.0, "learning_rate": 1e-3, "supervised_tokens": 10}
    always |= {"seconds": 0.5, "peak_memory_bytes": 3_000_000_000, "mfu": 0.4}
    rows = [
        {"step": step, "loss": 5 / step, "tokens_per_second": 100.0 * step, **always}
        for step in range(1, 21)
    ]
    # The first was on other held-out data, so its loss does not count as the best.
    rows += [
        {"step": step, "eval_loss": loss, "eval_perplexity": 9.0, "eval_data": data}
        for step, loss, data in ((1, 0.1, "c"), (5, 3.5, "d"), (10, 1.25, "d"))
    ]
    rows.append({**rows[-1], "step": 15, "eval_loss": 1.5})
    samples = [
        {"step": step, "prompt": EVIL, "text": f" wrote {step} {EVIL} {HIDDEN}"}
        for step in (10, 20)
    ]
    rows.sort(key=lambda row: row["step"])
    for name, content in (("metrics", rows), ("samples", samples)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (run / f"{name}.jsonl").write_text(lines)
    data = {"rows_read": 12, "examples": 11, "tokens": 110, "dropped": {EVIL: 1}}
    data |= {"sources": [{"name": EVIL, "share": 0.5}], "fingerprint": "f" * 64}
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


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.strings = [], [], []
        self.feed(html)
        self.text = " ".join(self.strings)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.strings.append(data)


@pytest.fixture
def html(directory):
    return render_run(read_run(directory))


def test_the_page_is_self_contained_and_shows_strings_as_they_are_stored(html):
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert page.text.count(EVIL) >= 11 and "a <run>" in page.text
    assert page.text.count(SHOWN) == 2
    assert not set(HIDDEN) & set(page.text)


def test_the_page_has_the_numbers_of_the_run(html):
    text = Page(html).text
    for expected in (
        *("step 20 of 40 when this was written", "best held-out loss, step 10"),
        *("1.2500", "10.0 s", "75.0%", "2.00 GB", "40.0%", "a <run>/adapter"),
        *("continued from: trainable parameters before", "learning rate", "5e-05"),
        *("0.0002", "weight decay"),  # a field of one group only
    ):
        assert expected in text
    # Samples are newest first, and zeros of a plan are left out.
    assert text.index("wrote 20") < text.index("wrote 10")
    assert "device bytes: loss" not in text


def test_charts_are_svg_with_their_curves(html):
    charts = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(charts) == 6
    loss, *small = (ElementTree.fromstring(svg) for svg in charts)
    assert loss.get("aria-label") == "Loss over steps"
    each, mean, held_out = loss.iter("polyline")
    assert len((each.get("points") or "").split()) == 20
    assert [mean.get("class"), held_out.get("class")] == ["line", "points"]
    tooltips = [title.text for title in loss.iter("title")]
    assert "held-out loss, step 10: 1.25" in tooltips and len(tooltips) == 4
    assert all(len(list(svg.iter("polyline"))) == 1 for svg in small)


def test_every_css_variable_is_defined(html):
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    defined = re.findall(r"--([\w-]+):", html)
    assert used <= set(defined)
    assert sorted(defined) == sorted([*set(defined)] * 2)  # in light and in dark


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        (None, "Finished after 20 steps."),
        (f"because {EVIL}", f"Ended early after step 20 of 40: because {EVIL}."),
    ],
)
def test_the_state_of_a_complete_run(directory, why, expected):
    report = {"steps": 20, "stopped_early": why}
    run = dataclasses.replace(read_run(directory), report=report)
    assert expected in Page(render_run(run)).text


HOSTILE = [
    *(None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "x", HIDDEN, ""),
    *([], {}, [[]], [None], {"": None}, {"dropped": 1}, {"dropped": {}, "sources": 3}),
    {"dropped": {"x": "y"}, "fingerprint": 1},
]


@pytest.mark.parametrize("name", ["started.json", "report.json"])
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_fields_that_no_run_writes_are_left_out_and_named(directory, name, value):
    facts = json.loads((directory / "started.json").read_text())
    facts |= {"steps": 20, "stopped_early": None, "eval": None}
    (directory / name).write_text(json.dumps(dict.fromkeys(facts, value)))
    run = read_run(directory)
    text = Page(render_run(run)).text
    kept = (run.report if name == "report.json" else run.started) or {}
    for field in facts:
        assert (field in kept) == (f"`{field}`" not in " ".join(run.notes))
    assert all(note in text for note in run.notes)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"7", b"[" * 100_000, b"9" * 5000], ids=len
)
@pytest.mark.parametrize(
    "name", ["started.json", "report.json", "metrics.jsonl", "samples.jsonl"]
)
def test_a_damaged_file_is_left_out_of_the_page_and_named(directory, name, content):
    (directory / name).write_bytes(content + b"\n")
    text = Page(render_run(read_run(directory))).text
    empty = not content and name.endswith("jsonl")
    assert (name in text and "Left out" in text) == (not empty)


def test_a_run_before_its_first_step_has_a_page(directory):
    for name in ("metrics.jsonl", "samples.jsonl", "started.json"):
        (directory / name).unlink()
    assert "No step has been taken yet." in render_run(read_run(directory))


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'notes' is undefined"):
        render_page("data.html", title="", name="")


def test_the_command_writes_the_page_and_returns_the_main_numbers(
    directory, tmp_path, capsys
):
    assert main(["report", str(directory), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == str(directory / "report.html")
    assert (result["step"], result["best_step"], result["best_loss"]) == (20, 10, 1.25)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    other = tmp_path / "other.html"
    assert main(["report", str(directory), "--output", str(other)]) == 0
    assert other.read_text() == page


def test_what_is_not_a_run_and_what_cannot_be_written_is_refused(
    directory, tmp_path, capsys
):
    assert main(["report", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no config\.toml"):
        read_run(tmp_path)
    no_folder = tmp_path / "none" / "page.html"
    assert main(["report", str(directory), "--output", str(no_folder)]) == 1
    assert "there is no directory" in capsys.readouterr().err
