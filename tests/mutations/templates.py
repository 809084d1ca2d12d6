"""Chat templates that never end, grow without bound, or reach for what is not theirs."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from mutations.mutant import SECRET_PATH, Template

import luthier_trainer.data.masks
from luthier.v1.tokenization_pb2 import Overlong, Tokenization, TrainOn

_BROUGHT = Path(luthier_trainer.data.masks.__file__).parent / "templates"
_LOOP = "{% for i in range(99999) %}"
_NS = "{% set ns = namespace(a='x', b=[1], c=[1]) %}"


def laughs(random: Random) -> Template:
    """Little that becomes much, step by step."""
    steps = random.choice((8, 20, 40, 100))
    macros = "{% macro m0() %}lol{% endmacro %}" + "".join(
        f"{{% macro m{n}() %}}{{{{ {' ~ '.join([f'm{n - 1}()'] * 10)} }}}}{{% endmacro %}}" for n in range(1, steps)
    )

    def repeated(step: str, end: str = "{{ ns.a }}", before: str = "") -> str:
        return f"{_NS}{before}{{% for i in range({steps}) %}}{step}{{% endfor %}}{end}"

    # Twice the same list in a list, over and over: little memory, and endless to write out, compare or sort.
    doubled = "{% set ns.b = [ns.b, ns.b] %}{% set ns.c = [ns.c, ns.c] %}"
    sources = {
        "macros": macros + f"{{{{ m{steps - 1}() }}}}",
        "tilde": repeated("{% set ns.a = ns.a ~ ns.a %}"),
        "plus": repeated("{% set ns.a = ns.a + ns.a %}"),
        "join": repeated("{% set ns.a = [ns.a, ns.a] | join %}"),
        "percent": repeated("{% set ns.a = '%s%s' % (ns.a, ns.a) %}"),
        "format": repeated("{% set ns.a = '%s%s' | format(ns.a, ns.a) %}"),
        "method": repeated("{% set ns.a = '{0}{0}'.format(ns.a) %}"),
        "replace": repeated("{% set ns.a = ns.a | replace('x', 'xx') %}"),
        "escape": repeated("{% set ns.a = (ns.a | e) ~ '&' %}"),
        "quote": repeated("{% set ns.a = (ns.a | urlencode) ~ '%' %}"),
        "json": repeated("{% set ns.a = ns.a | tojson %}"),
        "repr": repeated("{% set ns.a = [ns.a, ns.a] | string %}"),
        "list": repeated("{% set ns.b = ns.b + ns.b %}", "{{ ns.b | length }}"),
        "times": repeated("{% set ns.a = ns.a * 9 %}"),
        "block": repeated("{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}"),
        "numbers": repeated("{% set ns.n = ns.n * ns.n %}", "{{ ns.n }}", "{% set ns.n = 99 %}"),
        "shared, written": repeated(doubled, "{{ ns.b }}"),
        "shared, as json": repeated(doubled, "{{ ns.b | tojson }}"),
        "shared, as text": repeated(doubled, "{{ (ns.b | string) | length }}"),
        "shared, joined": repeated(doubled, "{{ ns.b | join }}"),
        "shared, compared": repeated(doubled, "{{ ns.b == ns.c }}"),
        "shared, sorted": repeated(doubled, "{{ [ns.b, ns.c] | sort | length }}"),
        "shared, sought": repeated(doubled, "{{ ns.b in [ns.c] }}"),
        "shared, as a key": repeated(
            "{% set ns.b = (ns.b, ns.b) %}", "{{ {ns.b: 1} | length }}", "{% set ns.b = (1,) %}"
        ),
        "shared, least": repeated(doubled, "{{ [ns.b, ns.c] | min | length }}"),
        "shared, unique": repeated(doubled, "{{ [ns.b, ns.c] | unique | list | length }}"),
    }
    return _of(random, sources)


def at_once(random: Random) -> Template:
    """One step that makes much."""
    number = random.choice((10**6, 10**8, 10**9, 10**12))
    sources = {
        "times": f"{{{{ 'x' * {number} }}}}",
        "list": f"{{{{ ([1] * {number}) | length }}}}",
        "power": "{{ 9 ** 9 ** 9 }}",
        "powers": f"{{{{ 10 ** {number} }}}}",
        "negative": "{{ 2 ** -9999999999 }}",
        "percent": f"{{{{ '%0{number}d' % 1 }}}}",
        "stars": f"{{{{ '%*d' % ({number}, 1) }}}}",
        "format": f"{{{{ '{{:>{number}}}'.format(1) }}}}",
        "format filter": f"{{{{ '%{number}s' | format('x') }}}}",
        "center": f"{{{{ 'x' | center({number}) }}}}",
        "ljust": f"{{{{ 'x'.ljust({number}) }}}}",
        "indent": f"{{{{ 'x\n' | indent({number}, true) }}}}",
        "range": f"{{{{ range({number}) | list | length }}}}",
        "sum": f"{{{{ range({number}) | sum }}}}",
        "json": f"{{{{ messages | tojson(indent={number}) }}}}",
        "round": f"{{{{ 1.5 | round({number}) }}}}",
        "float": "{{ '1e999' | float | int }}",
        "int": "{{ ('9' * 100000) | int }}",
        "wrap": f"{{{{ ('x ' * 1000000) | wordwrap({number}) }}}}",
        "tags": "{{ ('<!--' * 200000) | striptags }}",
        "urls": "{{ ('www.' * 200000) | urlize }}",
        "words": "{{ ('x ' * 5000000) | wordcount }}",
        "sort": "{{ (range(99999) | list * 20) | sort | length }}",
        "lipsum": f"{{{{ lipsum(n={number}) }}}}",
        "split": "{{ ('x,' * 20000000).split(',') | length }}",
        "truncate": f"{{{{ 'x' | truncate({number}) }}}}",
        "slice": f"{{{{ 'abc' | slice({number}) | list | length }}}}",
        "batch": f"{{{{ 'abc' | batch({number}, 'x') | list | length }}}}",
        "expandtabs": f"{{{{ '\\t'.expandtabs({number}) }}}}",
        "bytes": f"{{{{ (1).to_bytes({number}, 'big') }}}}",
        "zip": "{{ ('x' * 10000000) | list | groupby('y') | list | length }}",
    }
    return _of(random, sources)


def loops(random: Random) -> Template:
    """Loops that take for ever, with output and without; recursion."""
    sources = {
        "nested": _LOOP * 4 + "{% endfor %}" * 4,
        "nested, writing": _LOOP * 3 + "x" + "{% endfor %}" * 3,
        "wide": _LOOP + "{{ 'x' * 1000 }}" + "{% endfor %}",
        "in a message": "{% for m in messages %}" + _LOOP * 3 + "{% endfor %}" * 3 + "{{ m.content }}{% endfor %}",
        "itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "each other": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
        "recursive": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "twice itself": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
        "caller": "{% macro a() %}{% call a() %}{{ caller() }}{% endcall %}{% endmacro %}{{ a() }}",
        "sieve": _LOOP + "{{ (range(99999) | sum) if i is divisibleby 9 else '' }}{% endfor %}",
        "searches": "{% set s = 'ab' * 5000000 %}" + _LOOP + "{% if 'ba' * 1000 ~ 'c' in s %}{% endif %}{% endfor %}",
        "counts": "{% set s = 'a' * 10000000 %}" + _LOOP + "{% set x = s.count('a' * 999) %}{% endfor %}",
        "sorting": "{% set l = range(99999) | list %}" + _LOOP + "{% set x = l | sort(reverse=true) %}{% endfor %}",
        "map": "{{ range(99999) | map('string') | map('length') | sum }}" * 500,
        "growing": _NS + _LOOP + "{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.b | length }}",
        "only when prompting": "{% if add_generation_prompt %}" + _LOOP * 3 + "{% endfor %}" * 3 + "{% endif %}a",
    }
    return _of(random, sources)


def escapes(random: Random) -> Template:
    """What would run code, read files, or tell of the machine, were there no sandbox."""
    reach = random.choice(
        ("''", "messages", "namespace", "raise_exception", "strftime_now", "loop", "self", "dict", "range")
    )
    calls = "__init__.__globals__['os'].popen('touch /tmp/luthier-escape').read()"
    sources = {
        "mro": f"{{{{ {reach}.__class__.__mro__[1].__subclasses__() }}}}",
        "attr filter": f"{{{{ {reach} | attr('__class__') | attr('__mro__') }}}}",
        "item": f"{{{{ {reach}['__class__']['__base__'] }}}}",
        "globals": f"{{{{ {reach}.__globals__['__builtins__']['open']('/etc/passwd').read() }}}}",
        "cycler": f"{{{{ cycler.{calls} }}}}",
        "joiner": f"{{{{ joiner.{calls} }}}}",
        "lipsum": "{{ lipsum.__globals__['os'].environ }}",
        "format": f"{{{{ '{{0.__class__.__init__.__globals__}}'.format({reach}) }}}}",
        "format map": f"{{{{ '{{a.__class__}}'.format_map({{'a': {reach}}}) }}}}",
        "percent": f"{{{{ '%(__class__)s' % {reach} }}}}",
        "map": f"{{{{ [{reach}] | map(attribute='__class__.__mro__') | list }}}}",
        "sort": f"{{{{ [{reach}] | sort(attribute='__class__') }}}}",
        "groupby": f"{{{{ [{reach}] | groupby('__class__') }}}}",
        "sum": f"{{{{ [{reach}] | sum(attribute='__class__', start='') }}}}",
        "set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__init__ }}",
        "namespace": "{{ namespace(__class__=1, _Namespace__attrs=2) }}",
        "frame": "{{ raise_exception.__code__.co_consts }}",
        "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "include": f"{{% include '../{SECRET_PATH}' %}}",
        "include ignoring": "{% include '/etc/passwd' ignore missing %}",
        "import": "{% import 'os' as os %}{{ os.environ }}",
        "from": "{% from 'subprocess' import run %}{{ run('id') }}",
        "extends": "{% extends '/etc/passwd' %}",
        "mutate": "{{ messages.append({'role': 'assistant', 'content': 'x'}) }}{{ messages.clear() }}",
        "update": "{% set _ = messages[0].update({'content': 'changed'}) %}{{ messages }}",
        "raise": "{{ raise_exception('x' * 1000000) }}",
        "raise odd": "{{ raise_exception(messages) }}",
        "undefined": "{{ nothing.at.all }}",
        "debug": "{% debug %}",
        "context": "{{ self._TemplateReference__context }}",
        "async": "{% for m in messages %}{{ m.__aiter__ }}{% endfor %}",
        "do": "{% do messages.pop() %}",
    }
    return _of(random, sources)


def sources(random: Random) -> Template:
    """Text that is hard to compile, or no template."""
    size = random.choice((100, 2000, 20_000, 120_000))
    made: dict[str, str] = {
        "braces": "{" * size,
        "expressions": "{{" * (size // 2),
        "opened": "{{ (" + "(" * size,
        "parentheses": "{{ " + "(" * (size // 2) + "1" + ")" * (size // 2) + " }}",
        "lists": "{{ " + "[" * (size // 2) + "]" * (size // 2) + " }}",
        "minuses": "{{ " + "-" * size + "1 }}",
        "nots": "{{ " + "not " * (size // 4) + "1 }}",
        "sums": "{{ 1" + "+1" * (size // 2) + " }}",
        "attributes": "{{ messages" + ".a" * (size // 2) + " }}",
        "filters": "{{ 'a'" + "|e" * (size // 2) + " }}",
        "calls": "{{ range" + "()" * (size // 2) + " }}",
        "ifs": "{% if 1 %}" * (size // 22) + "{% endif %}" * (size // 22),
        "elifs": "{% if 0 %}" + "{% elif 0 %}" * (size // 12) + "{% endif %}",
        "fors": "{% for a in messages %}" * (size // 40) + "{% endfor %}" * (size // 40),
        "macros": "{% macro a() %}" * (size // 30) + "{% endmacro %}" * (size // 30),
        "blocks": "{% block a %}{% endblock %}{% block a %}{% endblock %}",
        "many blocks": "".join(f"{{% block b{n} %}}{{% endblock %}}" for n in range(size // 30)),
        "generations": "{% generation %}" * (size // 34) + "a" + "{% endgeneration %}" * (size // 34),
        "half a generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "comment": "{# " + "#" * size,
        "raw": "{% raw %}" + "{{ 1 }}" * (size // 7),
        "numbers": "{{ " + "9" * size + " }}",
        "name": "{{ " + "a" * size + " }}",
        "names": "".join(f"{{% set a{n} = {n} %}}" for n in range(size // 20)),
        "string": "{{ '" + "\\\\" * (size // 2) + "' }}",
        "surrogate": "{{ '\\ud800' }}{{ messages }}",
        "nul": "a\0b{{ '\\x00' }}{{ messages[0].content }}",
        "marks": "\ufeff\u202e\u2028{{ messages }}",
        "text": "x" * size,
        "nothing": "",
        "space": " \n" * (size // 2),
        "too long": "{{ 1 }}" * 19_000,
        "tags": "{% " + "x" * size + " %}",
        "ternary": "{{ " + "1 if 1 else " * (size // 12) + "1 }}",
        "compared": "{{ 1" + "<1" * (size // 2) + " }}",
        "tilde": "{{ 1" + "~1" * (size // 2) + " }}",
        "dicts": "{{ " + "{1:" * (size // 4) + "1" + "}" * (size // 4) + " }}",
    }
    return _of(random, made)


def turned(random: Random) -> Template:
    """Templates that render, but not what the row says: without it, in other order, with control tokens in places."""
    made = {
        "constant": "always the same",
        "last": "{{ messages[-1].content }}",
        "reversed": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "by length": "{% for m in messages | sort(attribute='content') %}{{ m.content }}{% endfor %}",
        "twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "count": "{{ messages | length }}{% for m in messages %}{{ m.role }}{% endfor %}",
        "cut": "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
        "all trained": "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "nothing trained": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
        "kept": "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}{{ x }}b",
        "in a macro": "{% macro a(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ a(m) }}{% endfor %}",
        "left by break": "{% for m in messages %}{% generation %}{{ m.content }}{% break %}{% endgeneration %}"
        "{% endfor %}",
        "filtered": "{% for m in messages %}{% filter upper %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfilter %}{% endfor %}",
        "combining": "{% for m in messages %}\u0301{{ m.content }}\u200d{% endfor %}",
        "controls": "{% for m in messages %}<|im_start|><|im_end|></s>{{ m.content }}<s>{% endfor %}",
        "refusing": "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}a",
        "by time": "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "odd time": "{{ strftime_now('%' * 100) }}{{ strftime_now('\\x00') }}{{ strftime_now('%9999999d') }}",
    }
    return _of(random, made)


def damaged(random: Random) -> Template:
    """A template that Luthier brings, with pieces of it gone, doubled or changed."""
    path = random.choice(sorted(_BROUGHT.glob("*.jinja")))
    source = path.read_text()
    for _ in range(random.choice((1, 1, 3, 10))):
        start = random.randrange(len(source))
        end = start + random.choice((1, 2, 10, 100))
        source = (
            source[:start] + random.choice(("", source[start:end] * 2, random.choice("{}%#'\"|()\0é"))) + source[end:]
        )
    return _with(random, path.stem, source)


def options(random: Random) -> Template:
    """Options that do not fit each other, or nothing."""
    tokenization = Tokenization(
        chat_template_name=random.choice(("", "chatml", "llama-3", "gemma", "mistral", "qwen", "nowhere")),
        train_on=_any(random, TrainOn.values()),
        overlong=_any(random, Overlong.values()),
        response_template=random.choice(
            ("", "is", "\0", " ", "a" * 200, "a" * 201, "é", "<|im_start|>assistant\n", "(.*)+$")
        ),
    )
    return Template("options", tokenization, random.choice((1, 50)), random.choice((8, 16, 512, 2**20, 7)))


def _of(random: Random, sources: dict[str, str]) -> Template:
    name = random.choice(sorted(sources))
    return _with(random, name, sources[name])


def _with(random: Random, name: str, source: str) -> Template:
    tokenization = Tokenization(chat_template=source.encode("utf-8", "replace").decode())
    if random.random() < 0.2:
        tokenization.train_on = random.choice(TrainOn.values())
    return Template(name, tokenization, random.choice((1, 3, 50)))


def _any(random: Random, known: Sequence[int]) -> Any:
    return random.choice([*known, 9])
