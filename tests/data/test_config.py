"""The `[data]` settings: refusals, defaults, sources of a mixture."""

import dataclasses
import inspect

import pytest

from qlora_jax.data.config import DataConfig, Source
from qlora_jax.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "`data.path` must name a file"),
        ({"format": "csv"}, r"`data.format` must be one of 'text', .*got 'csv'"),
        ({"too_long": "cut"}, "`data.too_long` must be one of"),
        ({"packing": 1}, "`data.packing` must be one of False, True, 'auto', got 1"),
        ({"shuffle": "no"}, "`data.shuffle` must be one of"),
        ({"append_eos": None}, "`data.append_eos` must be one of"),
        ({"max_length": 1}, "`data.max_length` must be an integer from 2"),
        ({"max_length": 8.0}, "`data.max_length` must be an integer"),
        ({"seed": -1}, "`data.seed` must be an integer from 0"),
        ({"seed": True}, "`data.seed` must be an integer"),
        ({"train_on": "answers"}, "`data.train_on` must be one of None, 'all'"),
        ({"train_on": "completion"}, "does not apply .*'text'; use 'all', 'assistant'"),
        (
            {"format": "messages", "train_on": "completion"},
            "does not apply to format='messages'; use 'assistant', 'last', 'all'",
        ),
        (
            {"format": "tokens", "train_on": "completion"},
            "does not apply to format='tokens'; use 'all'",
        ),
        (
            {"prompt": "{q}"},
            "is read by format='prompt_completion' and 'messages' only",
        ),
        ({"format": "messages", "prompt": "{q}"}, "together: give both, or none of th"),
        (
            {"format": "messages", "prompt": "", "completion": "{a}", "messages": "m"},
            "`data.messages` names a conversation, and `data.prompt` makes one",
        ),
        ({"train_on": "assistant"}, "needs `data.instruction_part` and"),
        ({"response_part": "A:"}, "both must be strings .* got None and 'A:'"),
        ({"response_part": "A:", "instruction_part": " "}, "that are not blank"),
        ({"response_part": "A:", "instruction_part": "A:"}, "are the same, 'A:'"),
        (
            {"response_part": "A:", "instruction_part": "Q:", "train_on": "all"},
            "trains every token, and `data.response_part` the answers alone",
        ),
        (
            {"format": "messages", "text": "{q}"},
            "`data.text` is read by format='text' only, and the format is 'messages'",
        ),
        ({"chat_template": "x"}, "read by format='prompt_completion' and 'messages' o"),
        ({"roles": {"bot": 3}}, "`data.roles` must be a table of strings, got {'bot"),
        ({"on_bad_row": "drop"}, "`data.on_bad_row` must be one of 'refuse', 'skip'"),
        ({"text": "{q:>99999}"}, "pads a field to 10,000 characters"),
        ({"text": "{q"}, r"`data.text` = '{q' is not a format string.*literal brace"),
        ({"text": "q"}, "`data.text` = 'q' names no field"),
        ({"text": "{}"}, "must name a row's fields in its braces"),
        ({"text": "{0}"}, "must name a row's fields in its braces"),
        ({"text": "{q.__class__}"}, "attributes have no meaning here"),
        ({"text": 3}, "`data.text` must be a string, got 3"),
    ],
)
def test_bad_settings_are_refused_at_construction(fields, message):
    # Wrong types are refused by our own words too, where nothing else checks them.
    config = object.__new__(DataConfig)
    defaults = {f.name: f.default for f in dataclasses.fields(DataConfig)}
    config.__dict__.update(defaults | {"path": "x.jsonl"} | fields)
    with pytest.raises(UserError, match=message):
        config.__post_init__()


def test_every_setting_is_documented_for_the_command_line():
    source = inspect.getsource(DataConfig)
    for field in dataclasses.fields(DataConfig):
        line = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert line.strip().startswith('"""'), field.name


def test_all_contradictions_are_raised_together():
    bad = {"path": "", "max_length": 1, "seed": -1, "train_on": "assistant"}
    bad["prompt"] = "{q}"
    with pytest.raises(UserError, match="^5 problems") as error:
        DataConfig(**bad)
    assert all(f"`data.{name}`" in str(error.value) for name in bad)


def test_a_source_overrides_the_settings_its_format_reads():
    config = DataConfig(
        format="prompt_completion",
        prompt="{q}",
        completion="{a}",
        max_length=77,
        sources=(
            Source(path="a", completion="{b}"),
            Source(path="b", format="text", text="{body}", append_eos=False),
            Source(path="c", format="tokens", train_on="all"),
            # Its rows hold conversations, not the fields of the other sources.
            Source(path="d", format="messages"),
        ),
    )
    (_, first), (_, second), (_, third), (_, fourth) = config.parts()
    assert fourth.prompt is fourth.completion is None
    assert (first.prompt, first.completion, first.max_length) == ("{q}", "{b}", 77)
    assert (second.format, second.text, second.prompt) == ("text", "{body}", None)
    assert (second.append_eos, third.append_eos) == (False, True)
    assert third.supervised == "all" and third.completion is None
    assert config.needs_tokenizer
    assert not dataclasses.replace(
        config, prompt=None, completion=None, sources=config.sources[2:3]
    ).needs_tokenizer


ONE = (Source("a"),)
UNLIKE = (Source("a", 1e-6), Source("b", 1.0))
WEIGHT = "`weight` of the source a must be a positive"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DataConfig, {"sources": ONE, "path": "b"}, "are both given"),
        (
            DataConfig,
            {"sources": (Source("a", 1.0), Source("b"))},
            "some sources have a `weight` and these have none: b",
        ),
        (DataConfig, {"sources": UNLIKE}, "largest may be 100,000 times the smallest"),
        (
            DataConfig,
            {"sources": (Source("a", format="text", prompt="{x}"),)},
            "Source a: `data.prompt` is read by format='prompt_completion' and 'messag",
        ),
        (
            DataConfig,
            {"sources": ONE, "prompt": "{x}"},
            "`data.prompt` is read by none of the `data.sources`",
        ),
        *(
            (Source, {"path": "a", "weight": weight}, WEIGHT)
            for weight in (0, -1.0, float("nan"), float("inf"))
        ),
        (Source, {"path": ""}, "`path` of a source must name a file"),
        (Source, {"path": ()}, "`path` of a source must name a file"),
    ],
)
def test_contradictory_mixtures_and_sources_are_refused(kind, fields, message):
    with pytest.raises(UserError, match=message):
        kind(**fields)
