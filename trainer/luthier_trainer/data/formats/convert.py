"""From a row to its record."""

from collections.abc import Callable, Mapping

from luthier_trainer.data.formats.chat import instruction, messages, prompt_completion, sharegpt
from luthier_trainer.data.formats.preference import preference
from luthier_trainer.data.formats.prompt_only import prompt_only
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.text import raw_text
from luthier_trainer.data.formats.unpaired import unpaired
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Format
from luthier_trainer.data.records import Record

_CONVERTERS: Mapping[Format, Callable[[Mapping[str, object]], Record]] = {
    Format.MESSAGES: messages,
    Format.PROMPT_COMPLETION: prompt_completion,
    Format.INSTRUCTION: instruction,
    Format.SHAREGPT: sharegpt,
    Format.TEXT: raw_text,
    Format.PREFERENCE: preference,
    Format.UNPAIRED_PREFERENCE: unpaired,
    Format.PROMPT_ONLY: prompt_only,
}


def convert(row: Mapping[str, object], row_format: Format) -> Record | Problem:
    """The record of a row in that format, or what is wrong with it. Whether its images are there is not looked at.

    Fields that no format has are ignored; those that would change what is trained and are not supported are refused.
    """
    try:
        return _CONVERTERS[row_format](row)
    except Refusal as refusal:
        return refusal.problem
