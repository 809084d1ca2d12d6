"""The order of turns: at most one system turn, first; assistant turns answer a user or a tool; tools answer calls.

Two user turns in a row, and turns after the last assistant turn, are allowed: they are context, and train nothing.
"""

from collections.abc import Callable

from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.records import Conversation

Place = Callable[[int], str]
"""How a turn is called in a message (`turn 3`), by its index in the conversation."""


def numbered(index: int) -> str:
    """The turn as it is numbered where the conversation is the row's."""
    return f"turn {index + 1}"


def check_trained(conversation: Conversation, place: Place = numbered) -> None:
    """Raises Refusal unless the turns are in order and at least one of the assistant's is trained."""
    if not conversation:
        raise Refusal("EMPTY_CONVERSATION", "The conversation has no turns.")
    if not check(conversation, place):
        if any(turn["role"] == "assistant" for turn in conversation):
            fix = "Give one of them the weight 1, or remove the row."
            raise Refusal("NOTHING_TRAINED", "All assistant turns have the weight 0: nothing is trained.", fix)
        raise Refusal("NO_ASSISTANT_TURN", "The conversation has no assistant turn to train on.")


def check_asks(conversation: Conversation, place: Place = numbered) -> None:
    """Raises Refusal unless the turns are in order and end where the assistant is to answer."""
    if not conversation:
        raise Refusal("EMPTY_CONVERSATION", "The prompt has no turns.")
    check(conversation, place)
    role = conversation[-1]["role"]
    if role not in ("user", "tool"):
        message = (
            f"The prompt ends with {'an' if role == 'assistant' else 'a'} {role} turn; it must end with a user turn."
        )
        raise Refusal("ROLES_OUT_OF_ORDER", message, "Remove the last turn, or let a user turn follow.")


def check(conversation: Conversation, place: Place = numbered) -> bool:
    """Whether any turn is trained. Raises Refusal when turns are out of order, or one of the assistant's is empty."""
    before = ""
    trained = False
    for index, turn in enumerate(conversation):
        role = turn["role"]
        if role == "assistant":
            if before != "user" and before != "tool":
                raise _out_of_order(before, place(index))
            content = turn["content"]
            if "tool_calls" in turn:
                role = "call"
            elif not content or (isinstance(content, str) and content.isspace()):
                message = f"The assistant's {place(index)} is empty: there is nothing to learn from it."
                raise Refusal("EMPTY_ASSISTANT", message, "Write its answer, or remove the row.")
            if "weight" not in turn:
                trained = True
        elif role == "tool":
            if before != "call" and before != "tool":
                message = f"The tool's {place(index)} answers no call."
                fix = 'A tool turn follows an assistant turn with "tool_calls", or another tool turn.'
                raise Refusal("ROLES_OUT_OF_ORDER", message, fix)
        elif role == "system" and index:
            message = f"A system turn comes after others ({place(index)}); only the first turn may be one."
            raise Refusal("ROLES_OUT_OF_ORDER", message, "Move it to the front, or make it a user turn.")
        before = role
    return trained


def _out_of_order(before: str, place: str) -> Refusal:
    if before in ("", "system"):
        message = f"The assistant's {place} comes before any user turn."
        return Refusal("ROLES_OUT_OF_ORDER", message, "Remove it, or put the user turn that it answers before it.")
    if before == "call":
        message = f"The assistant's {place} follows its own tool call."
        return Refusal("ROLES_OUT_OF_ORDER", message, "Put the tool's answer between them, or make both one turn.")
    message = f"The assistant's {place} follows an assistant turn; it must answer a user or a tool turn."
    return Refusal("ROLES_OUT_OF_ORDER", message, "Make both one turn, or put a user turn between them.")
