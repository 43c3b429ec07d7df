"""Expressions match as `re` matches them, and never hold the program."""

import random
import re
import time

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora import patterns
from qlora_jax.lora.config import AT_END
from qlora_jax.lora.patterns import match_patterns

LAYER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = (
    *("model.embed_tokens", "model.norm", "lm_head", "a{e}", "p{}"),
    *(f"model.layers.{n}.{name}" for n in (0, 25, 125) for name in LAYER),
)
WRITTEN_BY_PEOPLE = (
    r".*",
    r".*\.layers\.(0|2)\..*(q_proj|down_proj)",
    r"layers\.[23]\.mlp\.(up|gate)_proj",
    r"^model.layers.0.self_attn.q_proj",
    r"(?!.*lm_head).*proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\..*",
    r".*\.(in_proj|o_proj|up_proj|down_proj)$",
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"^(model(?=\.).*\.(k_proj|up_proj|v_proj|down_proj|gate_proj|o_proj|q_proj))$",
    r"(.*(model.text_model).*(down_proj|q_proj|v_proj|o_proj).*$|.*(up_proj).*$)",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|"
    r"mlp|feed_forward|ffn|dense).*?(?:qkv|proj|linear_fc1|out_proj|gate_proj|q_proj)"
    r".*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|"
    r"ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
    r"(?:\w+\.)*q_proj",
    r"([^.]+\.)+[qv]_proj",
    r"(?i)MODEL\..*PROJ",
    r"(?i:model)\..*(?<!down)_proj",
    r"\bmodel\b.{0,20}layers.{1,3}[^a-z]?[^x]\S\S*",
    r".*_proj++",
    "^(?:"
    + "|".join(re.escape(f"model.layers.{i}.{x}") for i in range(126) for x in LAYER)
    + ")$",
    # `regex` alone would read these as fuzzy matching and as a POSIX class.
    *(r"a{e}", r"(?:b|a){e<=1}", r"p{}", r"[l[:alpha:]]", r"[l[:alpha:]].*", r"\{e}|."),
)


def names_of(pattern, **options):
    return {*match_patterns((pattern,), PATHS, field="here", **options)[pattern]}


@pytest.mark.parametrize("pattern", WRITTEN_BY_PEOPLE)
def test_an_expression_matches_the_names_that_re_matches(pattern):
    assert names_of(pattern) == {n for n in PATHS if re.fullmatch(pattern, n)}
    if not pattern.startswith("(?i)"):
        larger = AT_END.replace("{}", pattern)
        assert names_of(pattern, inside=AT_END) == {
            n for n in PATHS if re.match(larger, n)
        }


def random_pattern(rng, depth):
    atoms = [".", r"\w", "[a-z]", "[^x]", r"\d", r"\.", r"\W", "o", "_", "p", "proj"]
    atoms += ["layers", "", "^", "$", r"\b", "(?=.*o)", "(?!.*lm)", "(?<=.)", "(?<!..)"]
    atoms += ["{e}", "{", "[a[:alpha:]]", "[:a]", "S", "[^S]", "[Z-a]", "(?#x)", r"\Z"]
    if depth <= 0 or rng.random() < 0.25:
        return rng.choice(atoms)
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.randint(2, 4))]
    repeats = ["*", "+", "?", "*?", "+?", "??", "*+", "{2,5}", "{0,9}", "{3}", "{,4}"]
    forms = [
        "".join(parts[:2]),
        f"(?:{'|'.join(parts)})",
        rng.choice(["(?=", "(?!", "(?>", "(?i:"]) + parts[0] + ")",
        f"({parts[0]}){rng.choice(repeats)}",
    ]
    return rng.choices(forms, [4, 2, 1, 4])[0]


def test_random_expressions_match_as_in_re_or_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        pattern = rng.choice(["", "(?i)"]) + random_pattern(rng, rng.randint(1, 5))
        try:
            matched = names_of(pattern)
        except UserError:
            refused += 1
            continue
        # The short names, on which `re` ends too.
        short = PATHS[1:5]
        assert matched & {*short} == {n for n in short if re.fullmatch(pattern, n)}
    assert refused < 150


@pytest.mark.parametrize(
    "pattern", [r"(?:(?:.|..)+)+[^a-z]", r"(?:.?|..?){0,999999}(?<!.)"]
)
def test_what_hangs_regex_too_is_refused_within_a_second(pattern):
    start = time.thread_time()
    with pytest.raises(UserError, match="here: the regular .* takes too long to match"):
        names_of(pattern)
    assert time.thread_time() - start < 1.5


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+$", r"(\w+)+$", r"(.*)*x", r"([a-z_.]+)+!", r"(.|[a-z]|\w)*$x"),
        *(r"(.|.)*?x", r".*.*.*.*x", r"(?:.{0,9}){0,9}x", r"(?:|.|..|...)+x"),
        *(r"(?=(.+)+x).*", r"(?!(.+)+x).*", r"(?>(.+)+x)", r"(?i)([A-Z_]+)*!"),
        *(r".?" * 40 + "." * 30, r"(?:){1000000}x?", r"(?:(?:){1000}){1000}"),
        *(r"(?=((.|..)+)+[^a-z]).*", r"model\.layers\.125\.((.|..)+)+[^a-z]"),
        *(r"(a?)*" * 30, r"(a+)+$" + "b" * 50, r"(?:.{0,99}){0,99}x"),
    ],
)
def test_what_would_hang_re_is_answered_or_refused_in_bounded_time(pattern):
    start = time.thread_time()
    try:
        match_patterns((pattern,), ("a" * 60, *PATHS), field="here")
    except UserError as error:
        assert "too long" in str(error)
    assert time.thread_time() - start < 1.5


def test_all_expressions_of_a_field_share_the_time(monkeypatch):
    slow = tuple(r"(?:(?:.|..)+){" + f"{n}}}[^a-z]" for n in range(1, 40))
    assert match_patterns(slow[:1], PATHS[:1], field="here")
    with monkeypatch.context() as patch:
        patch.setattr(patterns, "SECONDS", 0.2)
        start = time.thread_time()
        with pytest.raises(UserError, match="takes too long"):
            match_patterns(slow, PATHS, field="here")
        assert time.thread_time() - start < 0.5
    # An expression for every module of a large model is ordinary.
    paths = tuple(f"model.layers.{i}.mlp.{x}_proj" for i in range(60) for x in "abcd")
    for start in ("", r".*\."):
        listed = tuple(start + path.partition(".")[2] for path in paths)
        matched = match_patterns(listed, paths, field="here", inside=AT_END)
        assert [set(matched[p]) for p in listed] == [{path} for path in paths]


def test_the_last_group_is_returned():
    inside = r".*{}.(\d+)"
    matched = match_patterns(("(layers|h)",), PATHS[-1:], field="here", inside=inside)
    assert matched == {"(layers|h)": {PATHS[-1]: "125"}}


@pytest.mark.parametrize(
    "pattern, match",
    [
        ("(q", r"here: the regular expression '\(q' is not valid: missing \)"),
        ("*q", "is not valid: nothing to repeat"),
        ("a{2,1}", "is not valid: min repeat greater than max"),
        ("a{1,99999999999}", "is not valid: the repetition number is too large"),
        ("[[a]", "is not valid: Possible nested set"),
        ("[a--b]", "is not valid: Possible set difference"),
        ("(?L)a", "is not valid: "),
        ("(?z)a", "is not valid: unknown extension"),
        (r"(?<=a+)b", "is not valid: look-behind requires fixed-width"),
        ("(" * 5000, "is nested too deeply"),
        ("(?:" * 300 + "a" + ")*" * 300, "is nested too deeply"),
        *((p, "has a back-reference") for p in (r"(q|k)\1", "(?P<n>q)(?P=n)")),
        (r"(q)?(?(1)a|b)", "has a back-reference"),
        ("q_\u00e9", "a character beyond ASCII"),
        ("[\\0-\\U0010ffff]", "a character beyond ASCII"),
        ("(?i)[\\0-\\uffff]", "a character beyond ASCII"),
        (r"\N{DIGIT ONE}", "a character beyond ASCII"),
        ("q\ud800", "a character beyond ASCII"),
        ("[^\u212a]*", "a character beyond ASCII"),
        ("a" * 250_001, r"aaa is too long, or repeats"),
        # `regex` would need gigabytes to compile these.
        (r".{99999999}", "or repeats groups too often"),
        (r"(?:(?:a{999}){999}){999}", "or repeats groups too often"),
        (r"(?x)(?:(?:a) {999} # a" + "\n" + "){999}", "or repeats groups too often"),
        ("(?:" * 30 + "a" + ")+?" * 30, "or repeats groups too often"),
    ],
)
def test_what_cannot_be_matched_is_refused(pattern, match):
    with pytest.raises(UserError, match=match) as error:
        match_patterns((pattern,), field="here")
    assert len(str(error.value)) < 400


def test_what_is_too_much_together_is_refused():
    with pytest.raises(UserError, match="here has 1,501 entries; at most 1,500 match"):
        match_patterns(("q_proj",) * 1501, field="here")
    with pytest.raises(UserError, match="'c+ is too long, or rep"):
        match_patterns(tuple(x * 100_000 for x in "abc"), field="here")


@pytest.mark.parametrize("pattern", ["a)|(b", "(?i)q_proj", "(?x)q # "])
def test_what_would_change_the_larger_expression_is_refused(pattern):
    with pytest.raises(UserError, match="is not valid"):
        match_patterns((pattern,), field="here", inside=AT_END)
