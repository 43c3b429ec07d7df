"""The page of the `data` command, from a report that is hostile and has every part."""

from html.parser import HTMLParser

import pytest

from qlora_jax.cli.data_page import render_data

EVIL = '<script>alert("x")</script>'


@pytest.fixture
def report():
    numbers = {
        **{"rows_read": 9, "rows_kept": 8, "examples": 8, "tokens": 2000},
        **{"supervised_tokens": 500, "supervised_eos": 7, "longest_row": 1500},
        **{"truncated": 1, "tokens_lost": 3, "documents_cut": 0},
        "supervised_per_example": [1, 2, 3, 4, 5000],
        "assistant_mask": EVIL,
        **{"dropped": {EVIL: 1}, "recognised": {EVIL: 8}, "unread": {EVIL: 2}},
        "sources": [],
        "places": {EVIL: [f"{EVIL}:1", "b:2"]},
    }
    source = {"name": EVIL, "share": 0.25, "passes_per_epoch": 1.5, "report": numbers}
    layout = {"rows": 4, "length": 512, "efficiency": 0.5}
    lengths = [{"from": 1, "to": 4, "examples": 0}, {"from": 5, "to": 8, "examples": 8}]
    example = {
        **{"number": 3, "length": 1500, "supervised_tokens": 1, "not_shown": 1497},
        **{"tokens": [7, 8, 9], "supervised": [False, True, False]},
        "text": [EVIL, "a\n b", "\u202e"],
    }
    rows = {"packing": False, "steps_per_epoch": 2.0}
    return {
        **{"data": {**numbers, "sources": [source]}, "lengths": lengths},
        **{"rows": {**rows, "packed": layout, "one_each": layout}},
        **{"notes": [EVIL], "examples": [example]},
    }


class Page(HTMLParser):
    """Tags with their attributes, and text, of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.strings, self.spans = [], [], []
        self.feed(html)
        self.text = "|".join(self.strings)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.strings.append(data)
        tag, attrs = self.tags[-1] if self.tags else ("", {})
        if tag == "span" and "title" in attrs and data.strip("\n"):
            self.spans.append((data, attrs.get("class"), attrs["title"]))


def test_each_token_has_its_text_label_position_and_id(report):
    page = Page(render_data(report, "rows"))
    assert page.spans == [
        (EVIL, None, "position 0, token 7"),
        ("a↵\n b", "on", "position 1, token 8"),
        ("[U+202E]", None, "position 2, token 9"),
    ]
    assert "... and 1,497 more tokens" in page.text


def test_every_string_is_escaped_and_every_part_shown(report):
    page = Page(render_data(report, EVIL))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 11  # title and heading among them
    for shown in (
        *("500 (25.0%)", "1 to 5,000, median 3", "1,500 tokens", "1 (3 tokens)"),
        *("one example a row (this run)", "5 - 8", f"{EVIL}:1, b:2", "1.5"),
    ):
        assert shown in page.text
    widths = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "bar"]
    assert widths == ["width: 0.0%", "width: 100.0%"]


def test_parts_without_content_have_no_heading(report):
    report["data"] |= {"sources": [], "places": {}, "assistant_mask": None}
    page = Page(render_data(report, "rows"))
    for heading in ("Sources", "truncated or dropped", "marked by"):
        assert heading not in page.text
