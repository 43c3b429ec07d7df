"""Chat templates of others: what is rendered here, what apart, and the limits there."""

import jinja2
import pytest

from qlora_jax.data import bounded_templates
from qlora_jax.data.bounded_templates import is_linear
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.errors import UserError

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content']|trim %}
{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- system_message }}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- set ns = namespace(last=0, out='') %}
{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}
{%- else %}{%- set content = '' %}{%- endif %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}
{%- for name, value in call.function.arguments | items %}{{- name + value|tojson }}
{%- endfor %}{%- endfor %}{%- endif %}
{%- set ns.out = ns.out + content %}
{{- '<|start|>' + message['role'] + '\n' + content.split('</think>')[-1].lstrip('\n') }}
{%- endfor %}"""

# What takes long, or much memory, or could.
WILD = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'x'|center(9999999999) }}",
    "{% set n = namespace(s='a') %}{% for i in 'x' * 64 %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "{% set n = namespace(s='aaaa') %}{% for m in 'abcdefghijklmnopqrstuvwxyz01234567'"
    " %}{% set c = n.s %}{% set n.s = n.s + c %}{% endfor %}{{ n.s }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ messages|tojson(indent=9999999) }}",
    "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}",
]


class Tokenizer:
    """A tokenizer as far as templates are concerned; it must not render by itself."""

    special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, template):
        self.chat_template = template

    def get_chat_template(self, template=None, tools=None):
        return template or self.chat_template

    def apply_chat_template(self, *_, **__):
        raise AssertionError("rendered in this process")


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "template", [LLAMA, "{% generation %}{{ messages }}{% endgeneration %}", "plain"]
)
def test_templates_as_models_have_them_are_rendered_in_this_process(template):
    assert is_linear(template)


@pytest.mark.parametrize("template", WILD)
def test_a_template_that_could_take_much_is_not(template):
    assert not is_linear(template)


def test_one_that_could_but_does_not_is_rendered_as_here(tokenizer):
    template = (
        "{% for i in range(messages|length) %}{{ bos_token }}{{ messages[i].content }}"
        "{% endfor %}{{ date_string }}"
    )
    expected = tokenizer.apply_chat_template(
        TURNS, chat_template=template, tokenize=False, date_string="x"
    )
    options = {"chat_template": template, "date_string": "x", "tools": None}
    assert bounded_templates.render(tokenizer, TURNS, **options) == expected
    with pytest.raises(ValueError, match="no turns"):
        bounded_templates.render(
            Tokenizer("{{ range(2) }}{{ raise_exception('no turns') }}"), TURNS
        )


@pytest.mark.parametrize("template", [WILD[0], WILD[1], WILD[6]], ids=len)
def test_one_that_does_is_refused_once_and_for_all(template, monkeypatch):
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    with pytest.raises(UserError, match="takes more than 1 s .* or 1.1 GB of memory"):
        ChatRenderer(Tokenizer(template))
    monkeypatch.setattr(bounded_templates._Worker, "_start", pytest.fail)
    with pytest.raises(UserError, match="takes more than"):
        ChatRenderer(Tokenizer(template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 // 0 + range(1)[0] }}", "division"),
        (WILD[7], "recursion"),
        ("{{ 10.0 ** 400 }}", "out of range|too large"),
        ("{{ range(9) }}{{ raise_exception('\x1b[31m') }}", "\x1b"),
    ],
)
def test_what_a_template_raises_is_one_error_of_the_row(template, reason):
    renderer = ChatRenderer(Tokenizer(template))
    with pytest.raises(UserError, match=f"rows:3: the chat template cannot .*{reason}"):
        renderer.text(TURNS, where="rows:3")


def test_a_template_that_cannot_be_parsed_is_named_as_such():
    with pytest.raises(jinja2.TemplateSyntaxError):
        is_linear("{% for %}")
    with pytest.raises(UserError, match="nested too deeply"):
        is_linear("{{ " + "(" * 5000 + ")" * 5000 + " }}")
