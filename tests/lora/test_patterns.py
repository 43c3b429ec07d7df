import random
import re
import time

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora import patterns
from qlora_jax.lora.patterns import _PATHS, check_pattern, check_patterns

# Module paths, with numbers and letters in the places that stand for any.
PATHS = sorted(
    {
        path.replace("#", digit).replace("?", letter)
        for path in _PATHS
        for digit in "05"
        for letter in "qv"
    }
)
IN_KEYS = r"(.*\.)?({})$"
WRITTEN_BY_PEOPLE = [
    r".*",
    r".*\.layers\.(0|2)\..*(q_proj|down_proj)",
    r"layers\.[23]\.mlp\.(up|gate)_proj",
    r"^model.layers.0.self_attn.v_proj",
    r"(?!.*lm_head).*proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\..*",
    r"model\.layers\.[0-9]+\.self_attn\.(q|v)_proj",
    r".*\.(in_proj|out_proj|up_proj|down_proj)$",
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r".*encoder.*block.0.*(SelfAttention|EncDecAttention|DenseReluDense).(k|q|v|wo|wi)$",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"^(model(?=\.).*\.(k_proj|up_proj|v_proj|down_proj|gate_proj|o_proj|q_proj))$",
    r"^(?!.*visual).*(?:o_proj|up_proj|v_proj|down_proj|k_proj|q_proj|gate_proj).*",
    r"(.*(model.text_model).*(down_proj|q_proj|v_proj|o_proj).*$|.*(text_proj).*$)",
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
    + "|".join(
        re.escape(f"model.layers.{i}.{name}_proj")
        for i in range(126)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
        + ("mlp.gate", "mlp.up", "mlp.down")
    )
    + ")$",
]


@pytest.mark.parametrize("pattern", WRITTEN_BY_PEOPLE)
def test_what_people_write_is_accepted(pattern):
    check_pattern(pattern)
    if not pattern.startswith("(?i)"):
        check_pattern(pattern, IN_KEYS)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\w+)+$",
        r"(.*)*x",
        r"([a-z_.]+)+!",
        r"(.|[a-z]|\w)*$x",
        r"(.|.)*?x",
        r".*.*.*.*x",
        r"(.?){40}(.){40}x",
        r".?" * 40 + "." * 30,
        r"(?:.{0,9}){0,9}x",
        r"(?:|.|..|...)+x",
        r"(?=(.+)+x).*",
        r"(?!(.+)+x).*",
        r".*.*(?<=(?:\w\w|[a-z].|.[a-z])(?:\w\w|[a-z].|.[a-z])(?:\w\w|[a-z].|.[a-z]))",
        r"(?>(.+)+x)",
        r"(?i)([A-Z_]+)*!",
        r"(?i:([A-Z_]+)*)!",
        r"model\.layers\.\d\d\d\.(.+)+x",
        r"model\.layers\.7\.(.+)+x",
        r"(a?)*" * 30,
        r"(?:){1000000}",
        r"(?:(?:){1000}){1000}",
    ],
)
def test_what_would_hang_is_refused_at_once(pattern):
    start = time.perf_counter()
    with pytest.raises(UserError, match="takes too long to match .more than 50,000 st"):
        check_pattern(pattern)
    assert time.perf_counter() - start < 5


def test_many_expressions_share_one_bound(monkeypatch):
    check_patterns([f"layers.{i}.mlp.up_proj" for i in range(300)], IN_KEYS)
    check_patterns([rf".*\.layers\.{i}\.mlp\.up_proj" for i in range(20)], IN_KEYS)
    with pytest.raises(UserError, match="1,501 names or regular expressions are more"):
        check_patterns(["q_proj"] * 1501)
    monkeypatch.setattr(patterns, "MAX_STEPS_TOGETHER", 50_000)
    check_patterns([r".*.*x"] * 2)
    with pytest.raises(UserError, match=r"50 reg.*'\.\*\.\*x', together take too long"):
        check_patterns([r".*.*x"] * 50)


@pytest.mark.parametrize(
    "pattern, match",
    [
        ("(q_proj", r"'\(q_proj' is not valid: missing \)"),
        ("*q", "is not valid: nothing to repeat"),
        ("a{2,1}", "is not valid: min repeat greater than max"),
        ("a{1,99999999999}", "is not valid: the repetition number is too large"),
        ("[[a]", "is not valid: Possible nested set"),
        ("(?L)a", "is not valid: "),
        ("(?z)a", "is not valid: unknown extension"),
        (r"\N{no such name}", "is not valid: "),
        (r"(?<=a+)b", "is not valid: look-behind requires fixed-width"),
        ("(" * 5000, "is nested too deeply"),
        ("(?:" * 300 + "a" + ")*" * 300, "is nested too deeply|takes too long"),
        (r"(q|k)_proj.\1", "refers back to one of its groups"),
        (r"(?P<n>q)(?P=n)", "refers back to one of its groups"),
        (r"(q)?(?(1)a|b)", "refers back to one of its groups"),
        ("q_\u00e9", "has a character beyond ASCII"),
        ("[\\0-\\U0010ffff]", "has a character beyond ASCII"),
        ("q\ud800", "has a character beyond ASCII"),
        ("[^\u212a]*", "has a character beyond ASCII"),
        ("a" * 100_001, r"a'\.\.\. \(100,001 characters\) is longer than 100,000"),
    ],
)
def test_what_cannot_be_matched_is_refused(pattern, match):
    with pytest.raises(UserError, match=match):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["a)|(b", "(?i)q_proj", "(?x)q # "])
def test_what_would_change_the_larger_expression_is_refused(pattern):
    with pytest.raises(UserError, match="is not valid"):
        check_pattern(pattern, IN_KEYS)


def random_pattern(rng: random.Random, depth: int) -> str:
    atoms = [".", r"\w", "[a-z]", "[^x]", r"\d", r"\.", r"\W", "o", "_", "p", "proj"]
    atoms += ["layers", "", "^", "$", r"\b", "(?=.*o)", "(?!.*lm)", "(?<=.)", "(?<!..)"]
    choice = rng.random()
    if depth <= 0 or choice < 0.25:
        return rng.choice(atoms)
    if choice < 0.5:
        return random_pattern(rng, depth - 1) + random_pattern(rng, depth - 1)
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.randint(2, 4))]
    if choice < 0.62:
        return f"(?:{'|'.join(parts)})"
    if choice < 0.67:
        return rng.choice(["(?=", "(?!", "(?>", "(?i:"]) + parts[0] + ")"
    repeats = ["*", "+", "?", "*?", "+?", "??", "*+", "{2,5}", "{0,9}", "{3}", "{0,40}"]
    return f"({parts[0]}){rng.choice(repeats)}"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_accepted_is_matched_in_bounded_time(seed):
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(120):
        pattern = random_pattern(rng, rng.randint(2, 7)) + rng.choice(["", "x", "!"])
        try:
            check_pattern(pattern)
        except UserError:
            refused += 1
            continue
        accepted += 1
        compiled = re.compile(pattern)
        inside = re.compile(IN_KEYS.replace("{}", pattern))
        start = time.perf_counter()
        for path in PATHS:
            compiled.fullmatch(path)
            inside.match(path)
        # 2 x 57 matches; the bound is one of hundreds of steps for each microsecond.
        assert time.perf_counter() - start < 2, pattern
    assert accepted > 80 and refused > 5
