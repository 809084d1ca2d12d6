"""What makes tokens of a task's rows: its tokenizer, its template and its options."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.trainer.v1 import task_pb2
from luthier_trainer.data.masks.render import template_sha256
from luthier_trainer.data.masks.template import Template, template_of
from luthier_trainer.data.tokens.options import Options, longest
from luthier_trainer.model import load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_LENGTH = 1024


@dataclass(frozen=True)
class Tokens:
    """How the rows of a task become tokens. config: the base model's; the tokenizer carries the template where
    a named or given one is used."""

    config: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    options: Options

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the template's source, hexadecimal."""
        return template_sha256(self.tokenizer, self.template)


def tokens_for(task: task_pb2.TrainerTask) -> Tokens:
    """What the task asks for, without any weights of its model.

    Raises TrainingError: MODEL_NOT_FOUND, and as `template_of`."""
    tokenizer = load_tokenizer(task.base_model)
    spec = task.spec.fine_tune
    wanted = spec.tokenization
    template = template_of(tokenizer, wanted)
    if wanted.chat_template or wanted.chat_template_name:
        tokenizer.chat_template = template.source  # what is trained is what is saved
    numbers = spec.hyperparameters
    max_length = numbers.max_length if numbers.HasField("max_length") else _MAX_LENGTH
    config = load_config(task.base_model)
    return Tokens(config, tokenizer, template, Options.of(wanted, longest(max_length, config)))
