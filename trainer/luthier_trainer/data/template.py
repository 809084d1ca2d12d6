"""A tokenizer's chat template: which one it is, and the text it makes of a conversation.

Templates come with models, so they are foreign code; transformers renders them in Jinja's immutable sandbox.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from luthier_trainer.data.formats import Message
from luthier_trainer.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer that has ChatML's tokens and no template, as some base models do.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Tokens that end a turn in the templates of the common model families, beside a tokenizer's own eos token.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|role_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama 3's templates write the day they are rendered on; a run that is resumed tomorrow must see the same tokens.
_DATE = "26 Jul 2024"

Span = tuple[int, int]
# transformers annotates it with str, and returns a pair.
_render_jinja_template = cast(Callable[..., tuple[list[str], list[list[Span]]]], render_jinja_template)


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with all that it needs.

    variables: what it may use beside the messages; marks_turns: whether it has `{% generation %}` blocks; turn_end:
    matches one of the tokens that end a turn; control: matches any token that stands for itself in a text.
    """

    source: str
    variables: dict[str, Any]
    marks_turns: bool
    turn_end: re.Pattern[str]
    control: re.Pattern[str]

    def render(self, conversation: Sequence[Message], *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation's text, with the generation prompt if asked for, and the character spans of its generation
        blocks. Raises TrainingError DATASET_INVALID when the template refuses the conversation."""
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in conversation]
        try:
            texts, blocks = _render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks_turns,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # a template is foreign code and raises what it likes
            line = " ".join(str(error).split())[:300] or type(error).__name__
            message = f"The model's chat template refuses the conversation: {line}"
            raise TrainingError("DATASET_INVALID", message) from error
        return texts[0], blocks[0] if blocks else []


def template_of(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template that conversations are rendered with: the tokenizer's own, or CHATML for one that has none but
    knows ChatML's tokens.

    Raises TrainingError: TEMPLATE_MISSING, or TOKENIZER_UNSUPPORTED for a tokenizer that cannot tell where its tokens
    lie in a text.
    """
    if not tokenizer.is_fast:
        raise TrainingError(
            "TOKENIZER_UNSUPPORTED",
            "The model's tokenizer has no tokenizer.json, so it cannot tell which tokens belong to a turn.",
            "Convert it: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY) with a fast tokenizer class.",
        )
    added = tokenizer.get_added_vocab()
    if tokenizer.chat_template:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:
            raise TrainingError("TEMPLATE_MISSING", f"The tokenizer has no default chat template: {error}") from error
    elif {"<|im_start|>", "<|im_end|>"} <= added.keys():
        source = CHATML
    else:
        raise TrainingError(
            "TEMPLATE_MISSING",
            "The model's tokenizer has no chat template, so it is not known how a conversation looks to the model.",
            "Take the model's instruction-tuned variant, or put a chat_template.jinja beside its tokenizer.",
        )
    own = [token for token in (tokenizer.eos_token, *_TURN_ENDS) if isinstance(token, str) and token in added]
    variables = {**tokenizer.special_tokens_map, "date_string": _DATE}
    return Template(source, variables, bool(_GENERATION.search(source)), _any_of(own), _any_of(added))


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")
