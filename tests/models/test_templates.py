"""Chat templates: the features that Hugging Face templates need work, and hostile attempts do not."""

# ruff: noqa: E501 (templates stand on one line, as models write them)

import datetime
import json
import subprocess
import sys

import pytest

from emlocal.errors import ModelError, UsageError
from emlocal.models.resolve import GGUFModel
from emlocal.models.templates import render
from tests.conftest import DATA

HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 2 < 3 & 3 > 2?"},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "{{ 7 * 7 }} <|im_end|> é"},
]


class TestFeatures:
    @pytest.mark.parametrize(
        ("template", "text"),
        [
            ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m.content }}{% endfor %}{{ eos_token }}", "<s>user:hi</s>"),
            ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
            ("  {% if true %}\nkept\n  {% endif %}\nend", "kept\nend"),  # trim_blocks, lstrip_blocks
            ("{{- ' x ' }}  {{- 'y' -}}  z", " x yz"),
            ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
            ("{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "6"),
            ("{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}", '{"b": "<é>", "a": [1, null, true]}'),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            ("{{ {'b': [1, 2], 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":1,"b":[1,2]}'),
            ("{{ messages[0]['content'] | trim | upper }}{{ ' a ' | trim }}{{ messages | length }}", "HIa1"),
            ("{{ messages[-1].role }}{{ messages[1:] | length }}", "user0"),
            ("{{ 'a,b'.split(',')[1] }}{{ ' x'.strip() }}{{ 'abc'.startswith('ab') }}{{ 'x'.replace('x', 'y') }}", "bxTruey"),
            ("{{ ['a', 'b'] | join('-') }}{{ '+'.join(['c', 'd']) }}{{ 'aXX' | replace('X', '.') }}", "a-bc+da.."),
            ("{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'eq', 'x') | list }}", "['user'][]"),
            ("{{ messages | join(', ', attribute='content') }}", "hi"),
            ("{% macro f(x, y='!') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f('b', y='?') }}", "<a!><b?>"),
            ("{{ undefined_name is defined }}{{ none is none }}{{ 'x' is string }}{{ messages is iterable }}", "FalseTrueTrueTrue"),
            ("{{ missing | default('d') }}{{ tools or 'no tools' }}{% if tools %}x{% endif %}", "dno tools"),
            ("{{ 'a' ~ 1 ~ 'b' }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 'ab' * 2 }}{{ 'x' in 'xy' }}", "a1b3332ababTrue"),
            ("{{ 'hello {}, {n}'.format('you', n=3) }}", "hello you, 3"),
            ("{{ {'a': 1}.items() | list }}{{ {'b': 2} | items | list }}{{ {'a': 1}.get('z', 'none') }}", "[('a', 1)][('b', 2)]none"),
            ("{% for m in messages %}{{ m.content.replace('h', 'H') }}{{ '-'.join(['a', 'b']) }}{% endfor %}", "Hia-b"),
            ("{% block b %}{{ 'a'.replace('a', 'b', 1) }}{% endblock %}", "b"),
            ("{# a comment #}x", "x"),
            ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
            ("{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% endfor %}", "hi"),
            ("{% for m in messages %}{% generation %}{{ m.content.replace('h', 'H') }}{% endgeneration %}{% endfor %}", "Hi"),
            ("{{ tools is none }}{{ documents is none }}{{ tools | tojson }}", "TrueTruenull"),
            ("{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, first=true) }}|{{ 'a\nb' | indent('> ') }}", "a\n    b\n\n    c|  a\n  b|a\n> b"),
            ("{{ 2.567 | round(1) }}{{ 2.5 | round(method='floor') | int }}", "2.62"),
            ("{{ [1, 2, 3.5] | sum }}{{ messages | sum(attribute='n', start=1) if false }}{{ [[1], [2]] | sum(start=[]) }}", "6.5[1, 2]"),
            ("{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}", "[[1, 2], [3, 0]][[1, 2], [3]]"),
            ("{{ '%s is %.2f, %5d' | format('pi', 3.14159, 7) }}{{ '%(a)s' | format(a=1) }}", "pi is 3.14,     71"),
            ("{{ '%s and %s' % ('a', none) }}{{ '%s' % messages[0].role }}{{ '100%%' % () }}", "a and Noneuser100%"),
            ("{{ 'ab' | center(6) }}|", "  ab  |"),
            ("{% macro never() %}{{ 'x' | wordwrap(3) | pprint | urlize }}{{ {} | xmlattr }}{% endmacro %}fine", "fine"),
            ("<b>&{{ '<&>' }}", "<b>&<&>"),  # a prompt is not HTML
        ],
    )  # fmt: skip
    def test_expressions(self, template, text) -> None:
        assert render(template, HI, bos="<s>", eos="</s>") == text

    def test_the_day(self) -> None:
        today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
        assert render("{{ strftime_now('%Y-%m-%d') }}", HI) >= today

    def test_variables(self) -> None:
        template = "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
        assert render(template, HI, enable_thinking=False) == "off"
        assert render(template, HI) == ""
        assert render("{{ add_generation_prompt }}", HI, add_generation_prompt=False) == "False"

    def test_what_people_say_is_not_a_template(self) -> None:
        text = render("{% for m in messages %}{{ m.content }}|{% endfor %}", TALK)
        assert text == "Be brief.|Is 2 < 3 & 3 > 2?|Yes.\n|{{ 7 * 7 }} <|im_end|> é|"

    def test_one_rendering_leaves_nothing_for_the_next(self) -> None:
        template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ x | default('-') }}"
        assert render(template, HI, x=1) == "11"
        assert render(template, HI) == "1-"
        assert sys.gettrace() is None or "pytest" not in repr(sys.gettrace())

    def test_messages_are_not_changed(self) -> None:
        messages = [dict(m) for m in TALK]
        render("{% for m in messages %}{% set m = {'content': 1} %}{% endfor %}", messages)
        assert messages == TALK


class TestRefusals:
    def test_raise_exception_is_the_users_error(self) -> None:
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok"
        with pytest.raises(UsageError, match="refuses this conversation: System role not supported"):
            render(template, TALK)
        assert render(template, HI) == "ok"

    @pytest.mark.parametrize(
        "template",
        ["{% if %}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ 'a' + 1 }}", "{% include 'x' %}", "{{ nothing() }}", "{{ 'a' | no_such_filter }}", "{% import 'os' as os %}", "{{ [1] | dictsort }}", "{% for i in [1] %}" * 30 + "x" + "{% endfor %}" * 30, "{{ '\\x1b[31m'.x.y }}"],
    )  # fmt: skip
    def test_broken_templates_are_the_models_error(self, template) -> None:
        with pytest.raises(ModelError, match="chat template fails") as caught:
            render(template, HI)
        assert "--raw" in caught.value.hint
        assert caught.value.message.isprintable()


DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a silent loop in an expression": "{{ range(99999) | map('string') | list | map('upper') | list | length }}" * 50,
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "doubled text": DOUBLING,
    "doubled lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled blocks": "{% set ns = namespace(x='a' * 9999) %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "one huge string": "{{ 'a' * 10**9 }}",
    "a product of two large ones": "{{ ('a' * 1000000 * 5000) | length }}",
    "a product of lists": "{{ ([0] * 100000 * 100000) | length }}",
    "powers": "{{ (999999 ** 1000000) % 7 }}",
    "powers of powers": "{{ 9 ** 9 ** 9 }}",
    "round": "{{ 1 | round(100000000, 'ceil') }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "slice": "{{ [1] | slice(100000000) | list | length }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list | length }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 100000) | length }}",
    "replace nothing": "{{ 'aaaa'.replace('', 'b' * 999999).replace('', 'b' * 999999) | length }}",
    "the filter replace": "{{ ('a' * 1000000) | replace('a', 'b' * 100000) | length }}",
    "join": "{{ (('a' * 1000000) | list) | join('x' * 100000) | length }}",
    "the method join": "{{ ('x' * 100000).join(('a' * 1000000) | list) | length }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 100000}) | length }}",
    "padding": "{{ 'a'.ljust(10000000000) | length }}",
    "padding of bytes": "{{ 'a'.encode().ljust(10000000000) | length }}",
    "center": "{{ 'a' | center(10000000000) | length }}",
    "indent": "{{ ('a\n' * 400000) | indent(1000) | length }}",
    "indent by a text": "{{ ('a\n' * 400000) | indent('b' * 100000) | length }}",
    "the filter format": "{{ '%1000000000d' | format(1) | length }}",
    "a width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "many decimals": "{{ '%.1000000000f' | format(1) | length }}",
    "decimals from outside": "{{ '%5.*f' | format(1000000000, 1) | length }}",
    "a mapping's width": "{{ '%(a)1000000000d' | format(a=1) | length }}",
    "sum of long lists": "{{ ([[0] * 100000] * 1000) | sum(start=[]) | length }}",
    "a filter that is never needed": "{{ ('a ' * 500000) | wordwrap(1) | length }}",
    "bytes of an int": "{{ (1).to_bytes(10000000000, 'big') | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) | length }}",
    "format with a width from outside": "{{ '{:>{}}'.format(1, 1000000000) | length }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) | length }}",
    "range": "{{ range(10**9) | list | length }}",
    "lorem ipsum": "{{ lipsum(100000) }}",
}  # fmt: skip


def test_hostile_templates_are_stopped_in_time_and_memory() -> None:
    """Runs in a separate process limited to 2 GB, so that a failure here is only a failure."""
    code = """
import json, resource, sys
from emlocal.models.templates import render
from emlocal.errors import ModelError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for name, template in json.load(sys.stdin).items():
    try:
        answer = f"rendered {len(render(template, [{'role': 'user', 'content': 'hi'}]))}"
    except ModelError as why:
        answer = why.message
    print(json.dumps([name, answer]), flush=True)
# not ru_maxrss, which begins with what the process that started this one held
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(HOSTILE), capture_output=True, text=True, timeout=120
    )
    *answers, peak = map(json.loads, done.stdout.splitlines() or ["0"])
    assert done.returncode == 0, (answers[-1:], done.stderr[-500:])
    assert len(answers) == len(HOSTILE)
    for name, answer in answers:
        assert "chat template" in answer, (name, answer)
    assert peak < 1_500_000  # kB


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ joiner.__call__.__func__ }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
        "{{ ['{0.__class__}'] | map('format', messages) | list }}",
    ],
)
def test_no_way_into_python(template) -> None:
    try:
        text = render(template, HI)
    except ModelError as why:
        text = why.message.split(":", 1)[1]
        assert "unsafe" in text or "undefined" in text or "not all arguments" in text or "internal" in text
        return
    assert text in ("", "[Undefined]")


@pytest.mark.parametrize("template", ["{{ messages.append({}) }}", "{{ messages[0].update({'a': 1}) }}", "{{ messages[0].pop('role') }}", "{{ messages.clear() }}"])  # fmt: skip
def test_a_template_cannot_change_the_conversation(template) -> None:
    messages = [dict(m) for m in HI]
    with pytest.raises(ModelError, match="unsafe"):
        render(template, messages)
    assert messages == HI


def test_a_long_conversation_is_not_mistaken_for_an_attack() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 20_000}] * 60  # 6 million characters
    text = render(template, messages)
    assert len(text) > 5_900_000


class TestRealModels:
    @pytest.mark.real
    def test_smollm2(self, smollm2: GGUFModel) -> None:
        template = smollm2.header.chat_template
        assert template
        greeting = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        assert render(template, HI) == (
            f"<|im_start|>system\n{greeting}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert render(template, TALK) == chatml(TALK)

    def test_qwen(self) -> None:
        """Tests the template of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), as in its GGUF file."""
        template = (DATA / "qwen2.5-chat-template.jinja").read_text("utf-8")
        greeting = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        assert render(template, HI) == (
            f"<|im_start|>system\n{greeting}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert render(template, TALK) == chatml(TALK)
        assert render(template, TALK, add_generation_prompt=False) == chatml(TALK).removesuffix(
            "<|im_start|>assistant\n"
        )


def chatml(messages: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"
