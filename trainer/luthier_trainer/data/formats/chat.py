"""Conversations as they are, and the three formats with other names for their turns.

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}
    prompt_completion   {"prompt": ..., "completion": ...}, each a string or a list of turns; the completion is trained
    instruction         {"instruction": "...", "input": "...", "output": "..."}, and also `history`

All of them may have `system`, `tools` and `images` beside.
"""

from collections.abc import Mapping

from luthier_trainer.data.formats.conversation import complete, conversation_under
from luthier_trainer.data.formats.fields import optional_text, required, text
from luthier_trainer.data.formats.order import check_trained
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.tools import tools
from luthier_trainer.data.formats.turns import turn, turns
from luthier_trainer.data.records import Chat, Conversation, context

_PAIRS = '"history" must be an array of [question, answer] pairs of strings.'


def messages(row: Mapping[str, object], key: str = "messages") -> Chat:
    """Raises Refusal."""
    conversation, place = conversation_under(row, key)
    check_trained(conversation, place)
    return Chat(conversation, tools(row))


def sharegpt(row: Mapping[str, object]) -> Chat:
    """Raises Refusal."""
    return messages(row, "conversations")


def prompt_completion(row: Mapping[str, object]) -> Chat:
    """Raises Refusal."""
    question, answer = question_and_answer(row)
    conversation = complete(question + answer, row)
    before = len(conversation) - len(answer)
    check_trained(conversation, lambda index: _place_in_pair(index, before))
    return Chat(conversation, tools(row))


def question_and_answer(row: Mapping[str, object]) -> tuple[Conversation, Conversation]:
    """Prompt, not trained, and completion. Raises Refusal."""
    return context(asked(required(row, "prompt"), "prompt")), answered(required(row, "completion"), "completion")


def asked(value: object, key: str) -> Conversation:
    """A prompt: turns, or the text of a user turn. Raises Refusal."""
    if isinstance(value, list):
        return turns(value, key)
    return [{"role": "user", "content": text(value, f'"{key}"')}]


def answered(value: object, key: str) -> Conversation:
    """An answer: turns, one turn, or the text of an assistant turn. Raises Refusal."""
    if isinstance(value, list):
        return turns(value, key)
    if isinstance(value, dict):
        return [turn(value, f'the turn under "{key}"')]
    return [{"role": "assistant", "content": text(value, f'"{key}"')}]


def instruction(row: Mapping[str, object]) -> Chat:
    """The pairs of history, then instruction and input as one user turn, separated by a blank line. Raises Refusal."""
    wanted = text(required(row, "instruction"), '"instruction"')
    given = optional_text(row, "input")
    answer = text(required(row, "output"), '"output"')
    conversation: Conversation = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Refusal("BAD_CONTENT", _PAIRS)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refusal("BAD_CONTENT", _PAIRS)
        conversation.append({"role": "user", "content": text(pair[0], 'A question of "history"')})
        conversation.append({"role": "assistant", "content": text(pair[1], 'An answer of "history"')})
    conversation.append({"role": "user", "content": f"{wanted}\n\n{given}" if given else wanted})
    conversation.append({"role": "assistant", "content": answer})
    conversation = complete(conversation, row)
    last = len(conversation) - 1
    check_trained(conversation, lambda index: 'turn, "output",' if index == last else 'turn in "history"')
    return Chat(conversation, tools(row))


def _place_in_pair(index: int, before: int) -> str:
    return f'turn {index - before + 1} of "completion"' if index >= before else f'turn {index + 1} of "prompt"'
