"""The Modelfile with which Ollama makes a model of a GGUF file.

Ollama renders conversations with a Go template. One is written where the model's own chat template is one of the
layouts known here, which is found by rendering conversations with both; Ollama reads the file's own template otherwise.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier_trainer.data.masks.template import Template
from luthier_trainer.data.records import Message
from luthier_trainer.errors import TrainingError

MODELFILE = "Modelfile"
_BREAKING = re.compile('"""|{{|}}')
"""What would end a string or a text in a Modelfile's template."""
_QUESTION, _ANSWER, _MORE, _RULE = "What is it?", "It is this.", "And that?", "Be brief."

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """How a family writes conversations. render: a conversation that asks for an answer, without what begins texts. go:
    the same for Ollama, whose `.Messages` have `.Role` and `.Content`; `.System` is all system turns."""

    name: str
    render: Callable[[Turns], str]
    go: str


def _chatml(turns: Turns) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def _llama3(turns: Turns) -> str:
    said = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)
    return said + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _gemma(turns: Turns) -> str:
    system = "".join(f"{text}\n\n" for role, text in turns if role == "system")
    said = ""
    for role, text in turns:
        if role != "system":
            said += f"<start_of_turn>{'model' if role == 'assistant' else role}\n{system}{text}<end_of_turn>\n"
            system = ""
    return said + "<start_of_turn>model\n"


def _mistral(before: str, after: str, answer: str, *, last: bool) -> Callable[[Turns], str]:
    """Mistral's, whose versions differ in spaces, and in whether the first or the last question has the system turn."""

    def render(turns: Turns) -> str:
        system = "".join(f"{text}\n\n" for role, text in turns if role == "system")
        asked = [place for place, (role, _) in enumerate(turns) if role == "user"]
        said = ""
        for place, (role, text) in enumerate(turns):
            if role == "user":
                said += before + (system if place == asked[-1 if last else 0] else "") + text + after
            elif role == "assistant":
                said += f"{answer}{text}</s>"
        return said

    return render


def _mistral_go(before: str, after: str, answer: str, *, last: bool) -> str:
    place = "(eq (len (slice $.Messages $i)) 1)" if last else "(eq $i 1)"  # a system turn comes before it
    return (
        '{{- range $i, $turn := .Messages }}{{ if eq $turn.Role "user" }}'
        + before
        + "{{ if and $.System "
        + place
        + " }}{{ $.System }}\n\n{{ end }}{{ $turn.Content }}"
        + after
        + '{{ else if eq $turn.Role "assistant" }}'
        + answer
        + "{{ $turn.Content }}</s>{{ end }}{{ end }}"
    )


def _mistral_layouts() -> list[Layout]:
    kinds = [("[INST] ", "[/INST]", " "), ("[INST] ", " [/INST]", " "), ("[INST]", "[/INST]", "")]
    kinds += [("[INST] ", " [/INST]", ""), ("[INST] ", "[/INST]", "")]
    return [
        Layout("mistral", _mistral(*kind, last=last), _mistral_go(*kind, last=last))
        for kind in kinds
        for last in (True, False)
    ]


LAYOUTS = (
    Layout(
        "chatml",
        _chatml,
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ),
    Layout(
        "llama-3",
        _llama3,
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Layout(
        "gemma",
        _gemma,
        '{{- range $i, $turn := .Messages }}{{ if ne $turn.Role "system" }}<start_of_turn>'
        '{{ if eq $turn.Role "assistant" }}model{{ else }}{{ $turn.Role }}{{ end }}\n'
        "{{ if and $.System (eq $i 1) }}{{ $.System }}\n\n{{ end }}{{ $turn.Content }}<end_of_turn>\n{{ end }}{{ end }}"
        "<start_of_turn>model\n",
    ),
    *_mistral_layouts(),
)


def write_modelfile(
    folder: Path, source: str, template: Template | None, ends: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Writes it. `source`: its first instructions, such as `FROM ./model-f16.gguf`; `template`: the chat template, None
    for none; `ends`: the texts of tokens that end an answer; `notes`: what a user should know."""
    lines = [*(f"# {note}" for note in notes), source]
    written = go_template(template) if template is not None and template.source else None
    if written is None:
        lines.append("# No TEMPLATE: the chat template is none that is known in Ollama's language. Ollama reads")
        lines.append("# tokenizer.chat_template in the file, and knows the layouts of many of them.")
    else:
        lines.append(f'TEMPLATE """{written}"""')
    lines += [f"PARAMETER stop {_quoted(each)}" for each in dict.fromkeys(ends) if _is_plain(each)]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(template: Template) -> str | None:
    """The template in Ollama's language that writes what the model's own writes; None when none is known. A system turn
    that the model's own adds where there is none is added too."""
    plain = [("user", _QUESTION)], [("user", _QUESTION), ("assistant", _ANSWER), ("user", _MORE)]
    asked = [_rendered(template, turns) for turns in plain]
    told = [_rendered(template, [("system", _RULE), *turns]) for turns in plain]
    if None in asked:
        return None
    for layout in LAYOUTS:
        with_system = [layout.render([("system", _RULE), *turns]) for turns in plain]
        if told != with_system and told != [None, None]:
            continue
        if asked == [layout.render(turns) for turns in plain]:
            return layout.go
        added = _added_system(asked, layout, plain)
        if added is not None:
            return added
    return None


def _added_system(asked: Sequence[str | None], layout: Layout, plain: Sequence[Turns]) -> str | None:
    """The layout with the system turn that the model's own template begins with when a conversation has none."""
    mark = "\0"
    before, _, after = layout.render([("system", mark), *plain[0]]).partition(mark)
    first = asked[0] or ""
    if not (first.startswith(before) and first.endswith(after)) or len(first) < len(before) + len(after):
        return None
    system = first[len(before) : len(first) - len(after)]
    fits = [layout.render([("system", system), *turns]) for turns in plain] == list(asked)
    ahead = layout.render([("system", system)]).removesuffix(layout.render([]))
    if not fits or layout.name not in ("chatml", "llama-3") or not system or _BREAKING.search(system):
        return None
    return "{{- if not .System }}" + ahead + "{{ end }}" + layout.go


def _rendered(template: Template, turns: Turns) -> str | None:
    """What the model's own template writes, without the token that begins texts, which Ollama adds; None when it
    refuses such a conversation."""
    messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
    try:
        text, _ = template.render(messages, prompt=True)
    except TrainingError:
        return None
    return text.removeprefix(str(template.variables.get("bos_token") or ""))


def _is_plain(text: str) -> bool:
    """Whether it can stand in a Modelfile's strings."""
    return text.isprintable() and not _BREAKING.search(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
