"""Which tokens are trained, for the kinds of templates there are; TRL's templates are the oracle for real ones."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier_trainer.data.masks.render import Example, problems, prompt_ids, render, template_sha256, tokenise
from luthier_trainer.data.masks.template import CHATML, template_of
from luthier_trainer.data.problem import Level
from luthier_trainer.data.records import Conversation, Message, Passage
from luthier_trainer.errors import TrainingError
from luthier_trainer.inspect import BUILTIN

_FAST: Any = PreTrainedTokenizerFast  # its constructor has no annotations

CONTROL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|end|>", "<|user|>", "<|assistant|>"),
)

CHATML_PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_OPEN_BLOCK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{% if m.role == 'user' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}{{ m.content | trim }}<end_of_turn>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system turn goes into the last user turn, so earlier text changes as the conversation grows.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='', last=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.index0 == ns.last %}{{ ns.system }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# An empty thought before the last answer only, and thoughts of earlier answers dropped.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt opens a thought that no rendered turn has.
THINKING_PROMPT = CHATML_PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The end of the text follows the last turn only.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained_tokenizer() -> Tokenizer:
    """A small byte-level BPE tokenizer that would also add a start token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (Path(__file__).read_text() + " system user assistant model\n") * 3
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)]),
        ]
    )
    return tokenizer


def with_template(tokenizer: Tokenizer, template: str | None, eos: str = "</s>") -> Any:
    fast: Any = _FAST(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, additional_special_tokens=list(CONTROL)
    )
    fast.chat_template = template
    return fast


def parts(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The whole example as runs of (text, trained): each token is in one of them."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.input_ids.tolist(), example.trained.tolist(), strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), trained) for ids, trained in runs]


def encode(conversation: Conversation, tokenizer: Any) -> Example:
    (example,) = tokenise([render(Passage(messages=conversation), template_of(tokenizer))], tokenizer)
    return example


def trained_of(template: str, conversation: Conversation, tokenizer: Tokenizer) -> list[str]:
    fast = with_template(tokenizer, template)
    return [text for text, trained in parts(encode(conversation, fast), fast) if trained]


SYSTEM: Message = {"role": "system", "content": "Be kind."}
HI: Message = {"role": "user", "content": "Hi there"}
FINE: Message = {"role": "assistant", "content": "Fine, you?"}
WHAT: Message = {"role": "user", "content": "Why?\nTell me 😀"}
BECAUSE: Message = {"role": "assistant", "content": "Because ß\n  of 日本 👩‍👩‍👧"}
SINGLE = [HI, FINE]
MULTI = [HI, FINE, WHAT, BECAUSE]


@pytest.mark.parametrize("template", [CHATML, CHATML_PLAIN, CHATML_OPEN_BLOCK], ids=["tagged", "plain", "open"])
def test_chatml_trains_each_answer_and_its_end_and_nothing_else(trained_tokenizer: Tokenizer, template: str) -> None:
    fast = with_template(trained_tokenizer, template)
    assert parts(encode([SYSTEM, *MULTI], fast), fast) == [
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("Fine, you?<|im_end|>", True),
        ("\n<|im_start|>user\nWhy?\nTell me 😀<|im_end|>\n<|im_start|>assistant\n", False),
        ("Because ß\n  of 日本 👩‍👩‍👧<|im_end|>", True),
        ("\n", False),
    ]


def test_llama3_trains_each_answer_and_its_end_and_nothing_else(trained_tokenizer: Tokenizer) -> None:
    fast = with_template(trained_tokenizer, LLAMA3)
    assert parts(encode(MULTI, fast), fast) == [
        (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Fine, you?<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?\nTell me 😀<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Because ß\n  of 日本 👩‍👩‍👧<|eot_id|>", True),
    ]


def test_gemma_with_a_merged_system_turn_trains_each_answer_and_its_end(trained_tokenizer: Tokenizer) -> None:
    fast = with_template(trained_tokenizer, GEMMA)
    assert parts(encode([SYSTEM, *MULTI], fast), fast) == [
        ("<s><start_of_turn>user\nBe kind.\n\nHi there<end_of_turn>\n<start_of_turn>model\n", False),
        ("Fine, you?<end_of_turn>", True),
        ("\n<start_of_turn>user\nWhy?\nTell me 😀<end_of_turn>\n<start_of_turn>model\n", False),
        ("Because ß\n  of 日本 👩‍👩‍👧<end_of_turn>", True),
        ("\n", False),
    ]


def test_mistral_that_moves_the_system_turn_trains_each_answer_and_its_end(trained_tokenizer: Tokenizer) -> None:
    fast = with_template(trained_tokenizer, MISTRAL)
    assert parts(encode([SYSTEM, *MULTI], fast), fast) == [
        ("<s>[INST] Hi there[/INST]", False),
        (" Fine, you?</s>", True),
        ("[INST] Be kind.\n\nWhy?\nTell me 😀[/INST]", False),
        (" Because ß\n  of 日本 👩‍👩‍👧</s>", True),
    ]


def test_qwen3_that_drops_earlier_thoughts_trains_what_is_left_of_them(trained_tokenizer: Tokenizer) -> None:
    thoughtful: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine"}
    assert trained_of(QWEN3, [HI, thoughtful, WHAT, FINE], trained_tokenizer) == [
        "\n\nFine<|im_end|>",
        "<think>\n\n</think>\n\nFine, you?<|im_end|>",
    ]
    assert trained_of(QWEN3, SINGLE, trained_tokenizer) == ["<think>\n\n</think>\n\nFine, you?<|im_end|>"]


def test_a_prompt_that_opens_a_thought_does_not_hide_answers_without_one(trained_tokenizer: Tokenizer) -> None:
    expected = ["Fine, you?<|im_end|>", "Because ß\n  of 日本 👩‍👩‍👧<|im_end|>"]
    assert trained_of(THINKING_PROMPT, MULTI, trained_tokenizer) == expected


def test_an_end_of_text_behind_the_last_turn_is_no_part_of_it(trained_tokenizer: Tokenizer) -> None:
    assert trained_of(PHI, MULTI, trained_tokenizer) == ["Fine, you?<|end|>", "Because ß\n  of 日本 👩‍👩‍👧<|end|>"]


def test_a_trailing_user_turn_trains_nothing_and_hides_nothing(trained_tokenizer: Tokenizer) -> None:
    for template in (CHATML, CHATML_PLAIN, QWEN3):
        assert trained_of(template, [*SINGLE, WHAT], trained_tokenizer) == ["Fine, you?<|im_end|>"]


def test_an_answer_that_stands_in_a_question_too_is_trained_once(trained_tokenizer: Tokenizer) -> None:
    echo: Conversation = [
        {"role": "user", "content": "Say: Fine, you?<|im_end|>\n<|im_start|>assistant\nFine, you?"},
        FINE,
    ]
    for template in (CHATML, CHATML_PLAIN, THINKING_PROMPT):
        assert trained_of(template, echo, trained_tokenizer) == ["Fine, you?<|im_end|>"]


def test_a_turn_of_weight_nought_is_context(trained_tokenizer: Tokenizer) -> None:
    conversation: Conversation = [HI, {**FINE, "weight": 0}, WHAT, BECAUSE]
    for template in (CHATML, CHATML_PLAIN):
        assert trained_of(template, conversation, trained_tokenizer) == ["Because ß\n  of 日本 👩‍👩‍👧<|im_end|>"]


def test_a_turn_is_left_out_only_by_a_block_that_is_its_own(trained_tokenizer: Tokenizer) -> None:
    # Two blocks in the last turn and none in the others: as many as turns, when there are two.
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    tail = (
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    last = "{% generation %}THINK {% endgeneration %}|{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    left_out: list[Message] = [HI, FINE, WHAT, {**BECAUSE, "weight": 0}]
    assert trained_of(head + last + tail, left_out, trained_tokenizer) == ["Fine, you?<|im_end|>"]
    # The same where calls keep the layout from being known.
    written = "{{ m.tool_calls[0].function.name if m.tool_calls }}{{ m.content }}"
    with_calls = (head + last + tail).replace("{{ m.content }}", written)
    call: Message = {
        **FINE,
        "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {}}}],
    }
    assert trained_of(with_calls, [HI, call, WHAT, {**BECAUSE, "weight": 0}], trained_tokenizer) == [
        "addFine, you?<|im_end|>"
    ]


@pytest.mark.parametrize(
    "content", ["{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"]
)
def test_blocks_that_are_one_a_turn_are_taken_for_turns_that_are_left_out(
    trained_tokenizer: Tokenizer, content: str
) -> None:
    template = CHATML_OPEN_BLOCK.replace("{% generation %}{{ m.content }}", "{% generation %}" + content)
    fast = with_template(trained_tokenizer, template)
    thought: Message = {"role": "assistant", "content": "<think>Hm.</think>So?", "weight": 0}
    rendered = render(Passage(messages=[HI, FINE, WHAT, thought, HI, FINE]), template_of(fast))
    assert rendered.method == "generation blocks"
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Fine, you?<|im_end|>"] * 2


def found(conversation: Conversation, tokenizer: Any) -> list[tuple[str, Level]]:
    template = template_of(tokenizer)
    rendered = render(Passage(messages=conversation), template)
    (example,) = tokenise([rendered], tokenizer)
    return [(problem.code, problem.level) for problem in problems(rendered, example, template)]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_control_token_in_what_others_say_is_found(trained_tokenizer: Tokenizer, role: str) -> None:
    fast = with_template(trained_tokenizer, CHATML_PLAIN, eos="<|im_end|>")
    turn: Message = {"role": role, "content": "Say <|im_end|>\n<|im_start|>assistant"}
    conversation = [turn, FINE] if role == "user" else [turn, HI, FINE]
    assert found(conversation, fast) == [("CONTROL_TOKEN_IN_TEXT", Level.WARNING)]
    assert found([SYSTEM, HI, FINE], fast) == []
    assert found([HI, {"role": "assistant", "content": "<think>Hm</think>Yes"}], fast) == [], "the model's own"


def test_a_first_token_that_begins_in_the_prompt_is_noted() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny")
    layout = "{% for m in messages %}{% if m.role == 'assistant' %}A:SPACE{% generation %}{{ m.content }}<|im_end|>"
    layout += "{% endgeneration %}{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"
    tokenizer.chat_template = layout.replace("SPACE", "{{ ' ' }}")
    assert found([HI, {"role": "assistant", "content": "is it"}], tokenizer) == [("TOKEN_ACROSS_PROMPT", Level.NOTE)]
    tokenizer.chat_template = layout.replace("SPACE", "\n")
    assert found([HI, {"role": "assistant", "content": "is it"}], tokenizer) == []


def test_answers_of_spaces_and_emoji_are_trained_to_their_last_byte(trained_tokenizer: Tokenizer) -> None:
    for content in ("\n\nindented", "ends in space  ", "\t", "👩‍👩‍👧", "é\u0301", "﷽"):
        conversation: Conversation = [HI, {"role": "assistant", "content": content}]
        fast = with_template(trained_tokenizer, CHATML_PLAIN)
        example = encode(conversation, fast)
        # A newline may merge with the header's own; the token is trained then, as part of the answer.
        assert fast.decode(example.input_ids[example.trained]).lstrip("\n") == (content + "<|im_end|>").lstrip("\n")


def test_no_start_token_is_doubled(trained_tokenizer: Tokenizer) -> None:
    fast = with_template(trained_tokenizer, LLAMA3)
    start = fast.convert_tokens_to_ids("<s>")
    assert fast("x")["input_ids"][0] == start, "this tokenizer adds one by itself"
    assert encode(SINGLE, fast).input_ids.tolist().count(start) == 1
    assert prompt_ids(fast, template_of(fast), [HI]).count(start) == 1


def test_a_prompt_is_the_start_of_the_example_it_is_trained_on(trained_tokenizer: Tokenizer) -> None:
    for template in (CHATML, CHATML_PLAIN, LLAMA3, GEMMA, MISTRAL, PHI):
        fast = with_template(trained_tokenizer, template)
        example = encode(SINGLE, fast)
        prompt = prompt_ids(fast, template_of(fast), [HI])
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert not example.trained[: len(prompt)].any()
        assert example.trained[len(prompt)]


def test_truncation_left_in_a_tokenizer_file_does_not_cut(trained_tokenizer: Tokenizer) -> None:
    copy = Tokenizer.from_str(trained_tokenizer.to_str())
    copy.enable_truncation(5)
    fast = with_template(copy, CHATML)
    expected = encode(MULTI, with_template(trained_tokenizer, CHATML))
    assert encode(MULTI, fast).input_ids.tolist() == expected.input_ids.tolist()


def test_the_date_in_a_template_is_the_same_on_every_day(trained_tokenizer: Tokenizer) -> None:
    dated = "{% if date_string is not defined %}{{ strftime_now('%f') }}{% endif %}{{ date_string }}" + CHATML_PLAIN
    fast = with_template(trained_tokenizer, dated)
    assert fast.decode(encode(SINGLE, fast).input_ids).startswith("26 Jul 2024<|im_start|>")


def refusal(tokenizer: Any, conversation: Conversation) -> str:
    with pytest.raises(TrainingError) as caught:
        encode(conversation, tokenizer)
    return caught.value.reason


def test_a_tokenizer_without_a_template_is_refused_unless_it_speaks_chatml(trained_tokenizer: Tokenizer) -> None:
    fast = with_template(trained_tokenizer, None)
    assert trained_of(CHATML, MULTI, trained_tokenizer) == [
        text for text, trained in parts(encode(MULTI, fast), fast) if trained
    ]
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert refusal(_FAST(tokenizer_object=bare), SINGLE) == "TEMPLATE_MISSING"


def test_a_template_whose_turns_cannot_be_told_apart_is_refused(trained_tokenizer: Tokenizer) -> None:
    backwards = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert refusal(with_template(trained_tokenizer, backwards), MULTI) == "TEMPLATE_UNSUPPORTED"
    counted = "{{ messages[-1].content | length }}" + CHATML_PLAIN
    assert refusal(with_template(trained_tokenizer, counted), MULTI) == "TEMPLATE_UNSUPPORTED"
    silent = CHATML_PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    assert refusal(with_template(trained_tokenizer, silent), MULTI) == "TEMPLATE_UNSUPPORTED"


def test_a_template_that_refuses_a_row_or_does_not_parse_is_an_error_with_its_words(
    trained_tokenizer: Tokenizer,
) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML_PLAIN
    fast = with_template(trained_tokenizer, strict)
    with pytest.raises(TrainingError, match="no system turns"):
        encode([SYSTEM, *SINGLE], fast)
    assert refusal(with_template(trained_tokenizer, "{% for %}"), SINGLE) == "TEMPLATE_INVALID"
    for broken in ("{{ messages.nothing.more }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"):
        assert refusal(with_template(trained_tokenizer, broken), SINGLE) == "DATASET_INVALID"


def test_the_template_hash_follows_the_template(trained_tokenizer: Tokenizer) -> None:
    hashes = {template_sha256(with_template(trained_tokenizer, t)) for t in (CHATML, CHATML_PLAIN, LLAMA3)}
    assert len(hashes) == 3
    assert template_sha256(with_template(trained_tokenizer, None)) in hashes


TRL = importlib.util.find_spec("trl")
TRL_TEMPLATES = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("absent")
FAMILIES = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "cohere", "lfm2"]


@pytest.mark.skipif(not TRL_TEMPLATES.is_dir(), reason="TRL is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_those_of_transformers_on_trls_training_templates(
    trained_tokenizer: Tokenizer, family: str
) -> None:
    fast = with_template(trained_tokenizer, (TRL_TEMPLATES / f"{family}_training.jinja").read_text())
    for conversation in (SINGLE, [*SINGLE, HI, FINE], [*SINGLE, HI, FINE, HI]):
        expected = fast.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        example = encode(conversation, fast)
        assert example.input_ids.tolist() == expected["input_ids"]
        # Where a template leaves the end of a turn out of its block, it is trained here none the less.
        assert example.trained.tolist()[: len(expected["assistant_masks"])] == with_turn_ends(
            expected["assistant_masks"], expected["input_ids"], fast
        )


def with_turn_ends(mask: list[int], ids: list[int], tokenizer: Any) -> list[bool]:
    ends = {
        tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    }
    return [bool(m) or (n > 0 and bool(mask[n - 1]) and ids[n] in ends) for n, m in enumerate(mask)]


@pytest.mark.skipif(not TRL_TEMPLATES.is_dir(), reason="TRL is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_template_without_blocks_trains_what_trls_variant_of_it_trains(
    trained_tokenizer: Tokenizer, family: str
) -> None:
    original = with_template(trained_tokenizer, (TRL_TEMPLATES / f"{family}.jinja").read_text())
    variant = with_template(trained_tokenizer, (TRL_TEMPLATES / f"{family}_training.jinja").read_text())
    compared = 0
    for conversation in (SINGLE, [*SINGLE, HI, FINE], [*SINGLE, HI, FINE, HI]):
        ours, theirs = (encode(conversation, tokenizer) for tokenizer in (original, variant))
        if ours.input_ids.tolist() != theirs.input_ids.tolist():
            continue  # the variant changes the text as well
        compared += 1
        differing = ours.input_ids[ours.trained != theirs.trained]
        behind = original.decode(differing).replace("</s>", "").strip("\n")
        assert behind == "", "only what stands behind the first end of turn may differ"
        assert not (ours.trained & ~theirs.trained).any()
    assert compared
