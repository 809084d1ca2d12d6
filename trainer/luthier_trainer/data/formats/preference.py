"""Two answers to one prompt, by three habits.

    {"prompt": ..., "chosen": ..., "rejected": ...}                strings or turns
    {"conversations": [...], "chosen": {...}, "rejected": {...}}   ShareGPT
    {"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}   OpenAI

Turns that both answers begin with belong to the prompt; where they repeat it, `prompt` may be absent.
"""

from collections.abc import Mapping

from luthier_trainer.data.formats.chat import answered, asked
from luthier_trainer.data.formats.conversation import complete
from luthier_trainer.data.formats.fields import required
from luthier_trainer.data.formats.order import Place, check_trained
from luthier_trainer.data.formats.refusal import Refusal
from luthier_trainer.data.formats.tools import tools
from luthier_trainer.data.formats.turns import decoded, turns
from luthier_trainer.data.records import Conversation, Message, Preference, context


def preference(row: Mapping[str, object]) -> Preference:
    """Raises Refusal."""
    if "preferred_output" in row or "non_preferred_output" in row:
        return _openai(row)
    chosen, rejected = answered(required(row, "chosen"), "chosen"), answered(required(row, "rejected"), "rejected")
    prompt: Conversation = []
    if row.get("prompt") is not None:
        prompt = asked(row["prompt"], "prompt")
    else:
        key = next((key for key in ("conversations", "messages") if row.get(key) is not None), None)
        if key is not None:
            prompt = turns(decoded(row[key], key), key)
            # Some datasets have the whole of one conversation beside the two.
            prompt = [] if prompt in (chosen, rejected) else prompt
        elif len(chosen) == 1 and len(rejected) == 1:
            message = f'"prompt" is {"null" if "prompt" in row else "missing"}: nothing says what the answers answer.'
            raise Refusal("MISSING_FIELD", message, "Write it, or write both answers as turns that begin with it.")
    return _preference(prompt, chosen, rejected, row, ("chosen", "rejected"))


def _openai(row: Mapping[str, object]) -> Preference:
    keys = ("preferred_output", "non_preferred_output")
    chosen, rejected = (answered(required(row, key), key) for key in keys)
    given = required(row, "input")
    if isinstance(given, dict):
        row = {**row, **{key: given[key] for key in ("tools", "functions") if given.get(key)}}
        given = required(given, "messages")
    return _preference(asked(given, "input"), chosen, rejected, row, keys)


def _preference(
    prompt: Conversation,
    chosen: Conversation,
    rejected: Conversation,
    row: Mapping[str, object],
    keys: tuple[str, ...],
) -> Preference:
    same = _shared(chosen, rejected, keys)
    prompt = _joined(prompt, chosen[:same], keys)
    # Images stand anywhere in the turns, so both conversations are completed whole and parted again.
    one = complete(context(prompt) + chosen[same:], row)
    other = complete(context(prompt) + rejected[same:], row)
    before = len(one) - len(chosen) + same
    check_trained(one, _places(before, same, keys[0]))
    check_trained(other, _places(before, same, keys[1]))
    return Preference(one[:before], one[before:], other[before:], tools(row))


def _shared(chosen: Conversation, rejected: Conversation, keys: tuple[str, ...]) -> int:
    """How many turns both begin with before an answer of the assistant: these belong to the prompt."""
    if chosen == rejected:
        message = f'"{keys[0]}" and "{keys[1]}" are the same: there is nothing to prefer.'
        raise Refusal("SAME_ANSWERS", message, "Remove the row.")
    found = -1
    for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one["role"] == other["role"] == "assistant":
            found = index
        if one != other:
            break
    if found < 0:
        message = f'"{keys[0]}" and "{keys[1]}" do not answer the same turns.'
        raise Refusal("DIFFERENT_PROMPTS", message, "Both begin with the same turns, or with the assistant's answer.")
    return found


def _joined(prompt: Conversation, shared: Conversation, keys: tuple[str, ...]) -> Conversation:
    """The prompt and what both answers begin with; where these repeat the prompt, it is taken once. Raises Refusal."""
    if not prompt or not shared:
        return prompt or shared
    if shared[0]["role"] == "assistant" or prompt[-1]["role"] != "user":
        return prompt + shared
    said, repeated = [_said(turn) for turn in prompt], [_said(turn) for turn in shared]
    if any(repeated[start : start + len(said)] == said for start in range(len(repeated) - len(said) + 1)):
        return shared
    if said[-len(repeated) :] == repeated:
        return prompt
    message = f'"{keys[0]}" and "{keys[1]}" begin with other turns than the prompt.'
    raise Refusal("DIFFERENT_PROMPTS", message, "Leave the prompt out of both, or remove the column of the prompt.")


def _said(turn: Message) -> tuple[str, object]:
    content = turn["content"]
    return turn["role"], content.strip() if isinstance(content, str) else content


def _places(before: int, same: int, key: str) -> Place:
    return lambda index: (
        f'turn {index - before + same + 1} of "{key}"' if index >= before else f"turn {index + 1} of the prompt"
    )
