"""Which template is taken, what it is given, and the fences around it."""

import importlib.util
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from luthier.v1 import tokenization_pb2
from luthier_trainer.data.masks import sandbox
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.spans import render
from luthier_trainer.data.masks.template import RowRefused, Template, template_of
from luthier_trainer.data.masks.templates import NAMED
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Conversation, Message, Passage
from luthier_trainer.errors import TrainingError

_FAST: Any = PreTrainedTokenizerFast  # its constructor has no annotations
HI: Message = {"role": "user", "content": "Hi"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT: Message = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "three"}
YES: Message = {"role": "assistant", "content": "Yes"}
SYSTEM: Message = {"role": "system", "content": "Be kind."}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
PICTURE: Message = {
    "role": "user",
    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}],
}


def tokenizer_with(*control: str, chat_template: str | None = None, **special: Any) -> Any:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer: Any = _FAST(tokenizer_object=backend, additional_special_tokens=list(control), **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def given(source: str, *control: str) -> Template:
    return template_of(tokenizer_with(*control, bos_token="<s>"), tokenization_pb2.Tokenization(chat_template=source))


def named(name: str, *control: str) -> Template:
    return template_of(tokenizer_with(*control), tokenization_pb2.Tokenization(chat_template_name=name))


def reason(source: str, conversation: Conversation | None = None) -> str:
    """Why a given template fails, or nothing."""
    try:
        given(source).render(conversation or [HI])
    except TrainingError as error:
        return error.reason
    return ""


def test_a_named_template_whose_tokens_the_tokenizer_does_not_know_is_refused_by_their_names() -> None:
    with pytest.raises(TrainingError, match=r"<\|end_header_id\|>, <\|eot_id\|>") as caught:
        named("llama-3", "<|start_header_id|>")
    assert caught.value.reason == "TEMPLATE_MISMATCH"
    with pytest.raises(TrainingError, match="chatml, llama-3, gemma, mistral, qwen") as caught:
        named("lama-3")
    assert caught.value.reason == "TEMPLATE_UNKNOWN"


def test_the_given_template_goes_before_the_models_own_and_the_named_one_is_luthiers() -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", chat_template="own")
    assert template_of(tokenizer).render([HI])[0] == "own"
    wanted = tokenization_pb2.Tokenization(chat_template="given")
    assert template_of(tokenizer, wanted).render([HI])[0] == "given"
    assert named("chatml", "<|im_start|>", "<|im_end|>").source == NAMED["chatml"].source


def test_a_model_without_a_template_takes_raw_text_and_refuses_conversations() -> None:
    template = template_of(tokenizer_with(eos_token="</s>"))
    rendered = render(Passage(text="Once"), template)
    assert (rendered.text, rendered.spans, rendered.method) == ("Once</s>", ((0, 8),), "all tokens")
    assert render(Passage(text="Once</s>"), template).text == "Once</s>"
    with pytest.raises(TrainingError, match="no chat template") as caught:
        render(Passage(messages=[HI, YES]), template)
    assert caught.value.reason == "TEMPLATE_MISSING"


def test_a_template_that_does_not_compile_is_refused_with_its_line() -> None:
    with pytest.raises(TrainingError, match="in line 3") as caught:
        given("{{ bos_token }}\n\n{% for m in %}{% endfor %}")
    assert caught.value.reason == "TEMPLATE_INVALID"
    for broken in ("{% include 'x' %}{% endif %}", "{{ x | no_such_filter }}", "{% " * 500, "{{" + "(" * 5000):
        assert reason(broken) == "TEMPLATE_INVALID"


def test_what_a_template_leaves_out_silently_is_a_problem_of_the_row() -> None:
    plain = given("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    lists_tools = given(
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    cases: list[tuple[Template, Conversation, tuple[Any, ...], str]] = [
        (plain, [HI, YES], (ADD,), "TOOLS_NOT_SUPPORTED"),
        (plain, [HI, CALL, RESULT, YES], (), "TOOLS_NOT_SUPPORTED"),
        (lists_tools, [HI, CALL, RESULT, YES], (ADD,), "TOOLS_NOT_SUPPORTED"),
        (plain, [PICTURE, YES], (), "IMAGES_NOT_SUPPORTED"),
    ]
    for template, conversation, tools, code in cases:
        with pytest.raises(RowRefused) as caught:
            template.render(conversation, tools=tools)
        assert caught.value.problem.code == code
        assert caught.value.reason == "DATASET_INVALID"
        assert pickle.loads(pickle.dumps(caught.value)).problem == caught.value.problem
    assert lists_tools.render([HI, YES], tools=(ADD,))[0].startswith('[{"type"')


def test_a_named_template_without_the_tokens_for_images_takes_text_and_refuses_images() -> None:
    blind = named("qwen", "<|im_start|>", "<|im_end|>")
    assert "Hi" in blind.render([HI, YES])[0]
    with pytest.raises(RowRefused, match="vision_start") as caught:
        blind.render([PICTURE, YES])
    fix = "Leave the images out of the rows: training on images is not offered yet."
    assert caught.value.problem == Problem("IMAGES_NOT_SUPPORTED", caught.value.message, fix)
    plain = given("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(RowRefused) as caught:
        plain.render([PICTURE, YES])
    assert caught.value.problem.fix == fix
    sighted = named("qwen", *NAMED["qwen"].tokens, *NAMED["qwen"].image_tokens)
    assert "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>" in sighted.render([PICTURE, YES])[0]


def test_a_template_that_only_knows_parts_gets_text_as_parts() -> None:
    parts = given("{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}")
    assert parts.render([HI, YES])[0] == "Hi|Yes|"


def test_the_day_is_the_same_on_every_day() -> None:
    template = given("{{ strftime_now('%d %b %Y') }}, {{ date_string }}")
    assert template.render([HI])[0] == "26 Jul 2024, 26 Jul 2024"


def test_a_family_template_that_makes_the_same_text_tells_which_tokens_are_the_assistants() -> None:
    # It refuses what the other proofs need: generation prompts, and markers.
    control = ("<|im_start|>", "<|im_end|>")
    odd = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt or 'Zqx' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    )
    rendered = render(Passage(messages=[HI, YES]), given(odd, *control))
    assert rendered.method == "family template"
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yes<|im_end|>"]


BOMBS = {
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{{ ([1] * 10 ** 10) | length }}",
    "a power": "{{ (10 ** (10 ** 10)) | string | length }}",
    "a power by steps": "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled by a loop": "{% set n = namespace(x='ha') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined by a tilde": "{% set n = namespace(x='ha') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "laughs in macros": "".join(
        f"{{% macro m{n}() %}}{'x' * 999 if not n else f'{{{{ m{n - 1}() }}}}' * 10}{{% endmacro %}}" for n in range(9)
    )
    + "{{ m8() }}",
    "laughs in blocks": "{% set n = namespace(x='ha') %}{% for i in range(60) %}"
    "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
    "kept pieces": "{% set n = namespace(x=[]) %}{% set a = 'a' * 10 ** 7 %}{% for i in range(9999) %}"
    "{% set n.x = n.x + [a ~ i] %}{% endfor %}",
    "replaced": "{% set a = 'a' * 10 ** 6 %}{{ a | replace('a', a) }}",
    "replaced by a method": "{% set a = 'a' * 10 ** 6 %}{{ a.replace('a', a) }}",
    "joined": "{% set a = 'a' * 10 ** 6 %}{{ a.join(a) | length }}",
    "joined by a filter": "{% set a = 'a' * 10 ** 6 %}{{ (a | join(a)) | length }}",
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "a wide format by a filter": "{{ '%999999999d' | format(1) }}",
    "a wide margin": "{{ 'a' | indent(10 ** 10, true) }}",
    "wide JSON": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "rounded": "{{ 1.5 | round(10 ** 10, 'ceil') }}",
    "a long text": "{% for i in range(99999) %}{% for j in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endfor %}",
}
SLOW = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}
FENCED_OFF = {
    "centred": "{{ 'a'.center(10 ** 10) }}",
    "centred markup": "{{ ('a' | safe).center(10 ** 10) }}",
    "formatted": "{{ '{:>9999999999}'.format(1) }}",
    "filled": "{{ 'a'.zfill(10 ** 10) }}",
    "tabs": "{{ 'a\t'.expandtabs(10 ** 10) }}",
    "summed lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "a namespace's insides": "{% set n = namespace(__class__=1) %}",
    "a file": "{% include '/etc/passwd' %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "too long a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a message changed": "{{ messages.append(1) }}",
}


def test_no_template_takes_more_memory_than_there_is_for_it() -> None:
    code = (
        "import resource, sys; from test_data_template import BOMBS, reason\n"
        "for name, source in BOMBS.items():\n"
        "    sys.stdout.write(f'{name}: {reason(source)}\\n')\n"
        "sys.stdout.write(f'peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}\\n')"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 * 1024**3, 8 * 1024**3))

    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    *lines, peak = ended.stdout.splitlines()
    assert lines == [f"{name}: TEMPLATE_TOO_LARGE" for name in BOMBS]
    assert int(peak.removeprefix("peak: ")) < 3 * 1024, "MiB"


@pytest.mark.parametrize("name", SLOW)
def test_a_template_that_takes_too_long_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    with pytest.raises(TrainingError) as caught:
        given(SLOW[name]).render([HI])
    assert caught.value.reason == "TEMPLATE_TOO_SLOW"
    assert reason("{{ messages[0].content }}") == "", "the next one has its own time"


@pytest.mark.parametrize("name", FENCED_OFF)
def test_a_template_that_leaves_its_fence_is_refused_with_the_row(name: str) -> None:
    assert reason(FENCED_OFF[name]) == "DATASET_INVALID"


def test_a_row_of_countless_turns_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    # No rendering takes long, but each turn is proven by renderings of its own.
    counted = given("{% for m in messages %}{{ loop.index }}{{ m.content }}\n{% endfor %}")
    with pytest.raises(TrainingError) as caught:
        render(Passage(messages=[HI, YES] * 2000), counted)
    assert caught.value.reason == "TEMPLATE_TOO_SLOW"


def test_each_rendering_of_a_row_has_its_time_and_a_row_of_many_turns_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)

    def work(seconds: float) -> None:
        ends = time.thread_time() + seconds
        while time.thread_time() < ends:
            sum(range(1000))  # the timer counts what the system does not do

    def rendered(turns: int, times: int, seconds: float) -> str:
        try:
            with sandbox.row_fence(turns):
                for _ in range(times):
                    with sandbox.fence():
                        work(seconds)
        except TrainingError as error:
            return error.message
        return ""

    assert rendered(60, 5, 0.05) == ""
    assert "on one row for more than 0.1 seconds" in rendered(60, 1, 5)
    assert "on one row of 2 turns" in rendered(2, 10, 0.05)
    assert "on one row of 2,000 turns for more than 1 seconds" in rendered(2000, 100, 0.05)
    work(0.3)  # nothing rings behind a fence


STUCK = (
    "import sys, time; from luthier.trainer.v1 import task_pb2; from luthier_trainer import work\n"
    "from luthier_trainer.data.masks import sandbox\n"
    "task = task_pb2.TrainerTask(); task.check.SetInParent()\n"
    "sandbox.MAX_SECONDS, sandbox.STUCK_SECONDS = 0.5, 1.5\n"
    "work.fence(task)\n"
)


def ended(program: str) -> int:
    return subprocess.run([sys.executable, "-c", STUCK + program], timeout=90, check=False).returncode


def test_a_rendering_that_hears_no_signal_ends_the_process_that_does_nothing_else() -> None:
    source = (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for _ in range(45) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    )
    assert ended(f"sandbox.compiled({source!r}).render({{}})") == -signal.SIGPROF


def test_renderings_that_take_long_together_and_other_work_do_not_end_it() -> None:
    program = (
        "def spin(seconds):\n"
        "    ends = time.thread_time() + seconds\n"
        "    while time.thread_time() < ends: sum(range(1000))\n"
        "with sandbox.row_fence(1000):\n"
        "    for _ in range(10):\n"
        "        with sandbox.fence(): spin(0.3)\n"
        "with sandbox.fence(): pass\n"
        "spin(2)\n"
    )
    assert ended(program) == 0


def test_a_template_as_long_as_a_book_is_refused() -> None:
    assert reason("a" * (sandbox.MAX_SOURCE + 1)) == "TEMPLATE_TOO_LARGE"


def test_threads_render_the_same_template_at_once() -> None:
    template = given("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    wrong: list[str] = []

    def work(number: int) -> None:
        for length in range(200):
            content = str(number) * length
            if template.render([{"role": "user", "content": content}]) != (content, [(0, length)]):
                wrong.append(content)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_block_whose_text_goes_elsewhere_first_is_not_believed() -> None:
    # Its place is only known where it is written straight into the text; transformers reports (0, 3) here.
    moved = (
        "{% for m in messages %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
        "<|im_start|>{{ m.role }}\n{{ x }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = render(Passage(messages=[HI, YES]), given(moved, "<|im_start|>", "<|im_end|>"))
    assert rendered.method == "prefixes"
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yes<|im_end|>"]


TRL = importlib.util.find_spec("trl")
TRL_TEMPLATES = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("absent")
CONVERSATIONS: list[tuple[Conversation, tuple[Any, ...]]] = [
    ([HI, YES], ()),
    ([SYSTEM, HI, YES, HI, YES], ()),
    ([HI, CALL, RESULT, YES], (ADD,)),
]


@pytest.mark.skipif(not TRL_TEMPLATES.is_dir(), reason="TRL is not installed")
@pytest.mark.parametrize("name", sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja")))
def test_published_templates_render_as_transformers_renders_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", type("Today", (), {"now": lambda: sandbox.TODAY}))
    source = (TRL_TEMPLATES / f"{name}.jinja").read_text()
    template = given(source)
    compared = 0
    for conversation, tools in CONVERSATIONS:
        if template.abilities.parts_only:
            conversation = [
                {**turn, "content": [{"type": "text", "text": str(turn["content"])}]} for turn in conversation
            ]
        for prompt in (False, True):
            render_as_they_do: Any = chat_template_utils.render_jinja_template
            try:
                texts, blocks = render_as_they_do(
                    [conversation],
                    list(tools) or None,
                    None,
                    source,
                    return_assistant_tokens_mask=template.marks_turns,
                    add_generation_prompt=prompt,
                    **template.variables,
                )
            except Exception:
                with pytest.raises(TrainingError):
                    template.render(conversation, tools=tools, prompt=prompt)
                continue
            try:
                text, ours = template.render(conversation, tools=tools, prompt=prompt)
            except RowRefused as refusal:
                assert refusal.problem.code == "TOOLS_NOT_SUPPORTED"
                continue
            compared += 1
            assert text == texts[0]
            assert ours == (blocks[0] if template.marks_turns else None)
    assert compared


def test_a_response_template_that_a_row_lacks_is_a_problem_of_the_row() -> None:
    template = given("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(RowRefused) as caught:
        render(Passage(messages=[HI, YES]), template, Masking(response_template="Assistant:"))
    assert caught.value.problem.code == "RESPONSE_TEMPLATE_MISSING"


def test_a_response_template_in_a_question_trains_nothing_of_it() -> None:
    template = given("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}")
    asked: Message = {"role": "user", "content": "What follows ### assistant:\nin a prompt?"}
    masking = Masking(response_template="### assistant:\n")
    rendered = render(Passage(messages=[asked, YES, HI, YES]), template, masking)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yes", "Yes\n"]
    assert rendered.endless == 2
    conversation: Conversation = [asked, {**YES, "weight": 0}, HI, YES]
    weighted = render(Passage(messages=conversation), template, masking)
    assert weighted.spans == rendered.spans[1:]
