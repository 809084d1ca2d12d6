"""The table: which tokens of every format's rows are trained under every family's template, token by token.

What is expected is written here by hand: the turns of each sample (`SAMPLES`), and a few lines for each family that put
them between its control tokens (`chatml` and on). Nothing of it goes through the code under test.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.v1 import tokenization_pb2
from luthier_trainer.data.formats import records
from luthier_trainer.data.masks.masking import Masking, TrainOn
from luthier_trainer.data.masks.render import problems, render, tokenise
from luthier_trainer.data.masks.template import RowRefused, Template, template_of
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Reading
from luthier_trainer.data.records import passages

_FAST: Any = PreTrainedTokenizerFast  # its constructor has no annotations

CONTROL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
)
FOLDER = Path(__file__).parents[2] / "samples"
ASSISTANT = Masking()
IMAGE = "\0image\0"
QUESTION = {"prompt": "question", "completion": "answer"}
COLUMNS = {"question-answer.csv": QUESTION, "gsm8k_train.jsonl": QUESTION}


@dataclass(frozen=True)
class Turn:
    """One turn, as it is expected of a sample. id: of the call that a tool answers."""

    role: str
    content: str
    trained: bool = False
    calls: tuple[tuple[str, dict[str, Any], str], ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Row:
    """One sequence. text: raw, without turns; to_answer: it ends with the generation prompt."""

    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    to_answer: bool = False


def system(content: str) -> Turn:
    return Turn("system", content)


def user(content: str) -> Turn:
    return Turn("user", content)


def answer(content: str, *calls: tuple[str, dict[str, Any], str]) -> Turn:
    return Turn("assistant", content, True, calls)


def context(content: str) -> Turn:
    return Turn("assistant", content)


def result(content: str, id: str = "") -> Turn:
    return Turn("tool", content, id=id)


def row(*turns: Turn, tools: tuple[dict[str, Any], ...] = (), to_answer: bool = False) -> Row:
    return Row(turns, tools, None, to_answer)


def tool(name: str, description: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


NUMBER, TEXT = {"type": "number"}, {"type": "string"}
ADD = tool("add", "Adds two numbers.", ["a", "b"], a=NUMBER, b=NUMBER)
DOOR = tool("open_door", "Opens the door of a room.", ["room"], room=TEXT)
PRICE = tool("price", "The price of a thing in euros.", ["thing"], thing=TEXT)
TABLE = tool("find_table", "Finds a free table.", ["people", "time"], people={"type": "integer"}, time=TEXT)
WEATHER = tool("get_weather", "The weather of a town now.", ["town"], town=TEXT)
WEATHER_IN_UNITS = tool(
    "get_weather",
    "The weather of a town now.",
    ["town"],
    town={"type": "string", "description": "Name of the town"},
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
)
KIRUNA = user("Hello, can you tell me how cold Kiruna is today?")

SAMPLES: dict[str, list[Row]] = {
    "messages.jsonl": [
        row(
            system("You are the clerk of a small lending library. Be brief."),
            user("Do you have a book about bees?"),
            answer('Two. "The Hive in Winter" is on shelf 4; the other is lent until Friday.'),
            user("I take the first."),
            answer("It is yours until the 14th."),
        ),
        row(user("Spell the word for the colour of grass."), answer("G, r, e, e, n.")),
        row(
            user("Wie heißt der höchste Berg der Alpen?"),
            answer("Der Mont Blanc, 4.806 Meter hoch. 🏔️"),
            user("Und auf Französisch?"),
            answer("Auch so: «Mont Blanc»."),
        ),
        row(
            system("Answer with code only."),
            user("A function that doubles a number."),
            answer("def double(number):\n    return 2 * number\n"),
            user("Thanks!"),
        ),
    ],
    "messages-parts.jsonl": [
        row(
            system("You explain words."),
            user("What is a luthier? One sentence."),
            answer("A luthier builds and repairs instruments with strings."),
        ),
        row(
            user("And what does a cooper make?"),
            answer("Barrels, casks and tubs."),
            user("Of what?"),
            answer("Of staves of oak."),
        ),
    ],
    "messages-tools.jsonl": [
        row(
            system("You know the weather."),
            user("Is it warmer in Porto or in Bergen?"),
            answer(
                "",
                ("get_weather", {"town": "Porto", "unit": "celsius"}, "call_1"),
                ("get_weather", {"town": "Bergen", "unit": "celsius"}, "call_2"),
            ),
            result('{"degrees": 21}', "call_1"),
            result('{"degrees": 9}', "call_2"),
            answer("In Porto: 21 degrees against 9."),
            user("Then I fly to Porto."),
            answer("Take a light coat all the same."),
            tools=(WEATHER_IN_UNITS,),
        ),
        row(
            user("What is 17 and 25?"),
            answer("Let me add them.", ("add", {"a": 17, "b": 25}, "")),
            result("42"),
            answer("It is 42."),
            tools=(ADD,),
        ),
        row(
            user("Open the kitchen."),
            answer("", ("open_door", {"room": "kitchen"}, "")),
            result("done"),
            answer("The kitchen is open."),
            tools=(DOOR,),
        ),
        row(
            user("Who wrote Faust?"),
            answer("Goethe did. For that I need no tool."),
            user("Add 1 and 2."),
            answer("", ("add", {"a": 1, "b": 2}, "call_9")),
            tools=(ADD,),
        ),
    ],
    "weights.jsonl": [
        row(user("What is 6 times 7?"), context("41."), user("Count again."), answer("42, I am sorry.")),
        row(
            system("Rhyme."),
            user("A cat"),
            answer("sat on a mat."),
            user("A dog"),
            context("is an animal."),
            user("That is no rhyme."),
            answer("A dog got lost in the fog."),
        ),
    ],
    "prompt-completion.jsonl": [
        row(user("The three primary colours are"), answer(" red, yellow and blue.")),
        row(
            system("Answer in one word."),
            user("The capital of Portugal?"),
            context("Lisbon"),
            user("Of Norway?"),
            answer("Oslo"),
        ),
        row(user("Translate into French: good evening"), answer("bonsoir")),
    ],
    "instruction.json": [
        row(user("Put the words in alphabetical order.\n\npear, apple, fig"), answer("apple, fig, pear")),
        row(user("Name a musical instrument with four strings."), answer("The violin.")),
        row(
            system("You are a gardener."),
            user("When do I sow peas?"),
            answer("In March, as soon as the ground can be worked."),
            user("And beans?"),
            answer("After the last frost, in the middle of May."),
        ),
    ],
    "sharegpt.json": [
        row(
            system("You are a patient teacher of chess."),
            user("How does the knight move?"),
            answer("Two squares straight and one to the side, and it may jump."),
            user("And the rook?"),
            answer("Straight, as far as it likes."),
        ),
        row(
            system("You speak like a sailor."),
            user("Where is left?"),
            answer("To port, lad, where the lantern is red!"),
        ),
        row(user("Say it wrong first: 2 + 2."), context("5"), user("Now right."), answer("4")),
        row(user("A number?"), context("Seventy."), user("A smaller one."), answer("Seven.")),
    ],
    "sharegpt-tools.json": [
        row(
            system("You book tables."),
            user("A table for four at eight, please."),
            answer("", ("find_table", {"people": 4, "time": "20:00"}, "")),
            result('{"table": 12}'),
            answer("Table 12 by the window is yours."),
            user("Wonderful."),
            answer("Until tonight!"),
            tools=(TABLE,),
        ),
        row(
            user("What do a hammer and a saw cost?"),
            answer("", ("price", {"thing": "hammer"}, ""), ("price", {"thing": "saw"}, "")),
            result("12"),
            result("19"),
            answer("Together 31 euros."),
            tools=(PRICE,),
        ),
    ],
    "preference-prompt.jsonl": [
        row(user("Name a wood for the top of a violin."), answer("Spruce: it is light and stiff.")),
        row(user("Name a wood for the top of a violin."), answer("Wood.")),
        row(system("Be polite."), user("Close the window."), answer("Gladly, it is closed.")),
        row(system("Be polite."), user("Close the window."), answer("Do it yourself.")),
        row(user("Is 91 prime?"), answer("No: 7 times 13.")),
        row(user("Is 91 prime?"), answer("Yes.")),
        row(user("How many sides has a cube?"), answer("Six.")),
        row(user("How many sides has a cube?"), answer("Four, like a square.")),
    ],
    "preference-sharegpt.jsonl": [
        row(user("Recommend a tea for the evening."), answer("Camomile: it has no caffeine.")),
        row(user("Recommend a tea for the evening."), answer("Strong black tea.")),
        *(
            row(
                system("You are a librarian."),
                user("May I eat here?"),
                context("Please do not."),
                user("And drink?"),
                answer(last),
            )
            for last in ("Water with a lid is fine.", "Whatever.")
        ),
    ],
    "preference-openai.jsonl": [
        row(KIRUNA, answer("", ("get_weather", {"town": "Kiruna"}, "call_1")), tools=(WEATHER,)),
        row(KIRUNA, answer("Cold, I suppose."), tools=(WEATHER,)),
        row(system("Give the result alone."), user("9 times 9"), answer("81")),
        row(
            system("Give the result alone."),
            user("9 times 9"),
            answer("Well, nine times nine makes, as everybody knows, 81."),
        ),
    ],
    "unpaired.jsonl": [
        row(user("How do I tune a guitar?"), answer("From low to high: E, A, D, G, B, E.")),
        row(
            system("Be helpful."),
            user("And a bass?"),
            context("Like the guitar's lowest four."),
            user("Which are?"),
            answer("No idea."),
        ),
        row(user("How many keys has a piano?"), answer("88.")),
        row(user("And an organ?"), answer("Go away.")),
    ],
    "prompt-only.jsonl": [
        row(user("What is 12 times 12? End with the number."), to_answer=True),
        row(
            system("Think in steps."),
            user("A train leaves at 9:40 and takes 85 minutes. When does it arrive?"),
            to_answer=True,
        ),
        row(user("Write a haiku about rosin."), to_answer=True),
    ],
    "question-answer.csv": [
        row(user("How many strings has a cello?"), answer("Four: C, G, D and A.")),
        row(user('What is "pizzicato"?'), answer("Plucking the strings\ninstead of bowing them.")),
        row(user("Is ebony heavy?"), answer("Yes; it sinks in water.")),
    ],
    "images": [
        row(user(f"{IMAGE}Which colour is this?"), answer("Red.")),
        row(user(f"{IMAGE}And is the second the same?{IMAGE}"), answer("No, the second is blue.")),
        row(
            user(f"First {IMAGE}, then {IMAGE}: what changed?"),
            answer("Blue became red."),
            user(f"And here? {IMAGE}"),
            answer("Blue again."),
        ),
    ],
    "data-url.jsonl": [row(user(f"Which colour is this? {IMAGE}"), answer("Red."))],
    "text.jsonl": [
        Row(
            text="A violin has four strings, tuned in fifths: G, D, A and E.\n\n"
            "The bow is strung with the hair of a horse."
        ),
        Row(text="Rosin makes the hair grip. Without it the bow slides over the string, and there is no sound."),
        Row(text="Ahorn für den Boden, Fichte für die Decke."),
    ],
}

Parts = list[tuple[str, bool]]
Family = Callable[[Row], Parts | str]
"""What a row is under a template: runs of (text, whether it is trained), or the code of the problem it has."""


def dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def has_image(row: Row) -> bool:
    return any(IMAGE in turn.content for turn in row.turns)


def chatml(row: Row) -> Parts | str:
    if row.tools:
        return "TOOLS_NOT_SUPPORTED"
    if has_image(row):
        return "IMAGES_NOT_SUPPORTED"
    parts = []
    for turn in row.turns:
        parts += [(f"<|im_start|>{turn.role}\n", False), (f"{turn.content}<|im_end|>", turn.trained), ("\n", False)]
    return [*parts, ("<|im_start|>assistant\n" * row.to_answer, False)]


def qwen(row: Row, images: bool = True) -> Parts | str:
    if has_image(row) and not images:
        return "IMAGES_NOT_SUPPORTED"
    parts: Parts = []
    turns = list(row.turns)
    if row.tools:
        own = turns.pop(0).content + "\n\n" if turns[0].role == "system" else ""
        tools = "".join("\n" + dumped(each) for each in row.tools)
        about = (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            f"function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\nFor each function "
            "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
        parts = [(f"<|im_start|>system\n{own}{about}<|im_end|>\n", False)]
    for before, turn, after in zip([None, *turns[:-1]], turns, [*turns[1:], None], strict=True):
        if turn.role == "tool":
            opened = "" if before and before.role == "tool" else "<|im_start|>user"
            closed = "" if after and after.role == "tool" else "<|im_end|>\n"
            parts.append((f"{opened}\n<tool_response>\n{turn.content}\n</tool_response>{closed}", False))
            continue
        content = turn.content.replace(IMAGE, "<|vision_start|><|image_pad|><|vision_end|>")
        calls = [
            f'<tool_call>\n{{"name": "{name}", "arguments": {dumped(arguments)}}}\n</tool_call>'
            for name, arguments, _ in turn.calls
        ]
        said = "\n".join([content] * bool(content) + calls)
        parts += [(f"<|im_start|>{turn.role}\n", False), (f"{said}<|im_end|>", turn.trained), ("\n", False)]
    return [*parts, ("<|im_start|>assistant\n" * row.to_answer, False)]


def llama(row: Row, tools: bool = True) -> Parts | str:
    if row.tools and not tools:
        return "TOOLS_NOT_SUPPORTED"
    if has_image(row):
        return "IMAGES_NOT_SUPPORTED"
    parts: Parts = [("<s>", False)]
    untold = bool(row.tools)
    if untold and row.turns[0].role != "system":
        parts.append(("<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n<|eot_id|>", False))
    for turn in row.turns:
        before = ""
        if turn.role == "system" and untold:
            before = "Environment: ipython\n"
        if turn.role == "user" and untold:
            untold = False
            before = (
                "Given the following functions, please respond with a JSON for a function call with its proper "
                "arguments that best answers the given prompt.\n\nRespond in the format "
                '{"name": function name, "parameters": '
                "dictionary of argument name and its value}.Do not use variables.\n\n"
            )
            before += "".join(json.dumps(each, indent=4, ensure_ascii=False) + "\n\n" for each in row.tools)
        calls = [f'{{"name": "{name}", "parameters": {dumped(arguments)}}}' for name, arguments, _ in turn.calls]
        said = "\n".join([turn.content.strip()] * bool(turn.content) + calls)
        role = "ipython" if turn.role == "tool" else turn.role
        parts += [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n{before}", False),
            (f"{said}<|eot_id|>", turn.trained),
        ]
    return [*parts, ("<|start_header_id|>assistant<|end_header_id|>\n\n" * row.to_answer, False)]


def gemma(row: Row, folds_system: bool = True) -> Parts | str:
    if row.tools:
        return "TOOLS_NOT_SUPPORTED"
    if has_image(row):
        return "IMAGES_NOT_SUPPORTED"
    parts: Parts = [("<s>", False)]
    before = ""
    for turn in row.turns:
        if turn.role == "system":
            if not folds_system:
                return "TEMPLATE_REFUSES"
            before = turn.content + "\n\n"
            continue
        role = "model" if turn.role == "assistant" else turn.role
        parts += [
            (f"<start_of_turn>{role}\n{before}", False),
            (f"{turn.content.strip()}<end_of_turn>", turn.trained),
            ("\n", False),
        ]
        before = ""
    return [*parts, ("<start_of_turn>model\n" * row.to_answer, False)]


def mistral(row: Row, original: bool = False) -> Parts | str:
    if has_image(row):
        return "IMAGES_NOT_SUPPORTED"
    if original and any(turn.calls for turn in row.turns):
        return "TEMPLATE_REFUSES"  # the samples' calls have no ids of nine letters
    parts: Parts = [("<s>", False)]
    own = "".join(turn.content + "\n\n" for turn in row.turns if turn.role == "system")
    turns = [turn for turn in row.turns if turn.role != "system"]
    last = max(number for number, turn in enumerate(turns) if turn.role == "user")
    for number, turn in enumerate(turns):
        if turn.role == "user":
            tools = f"[AVAILABLE_TOOLS] {dumped(row.tools)}[/AVAILABLE_TOOLS]" if row.tools and number == last else ""
            shown = own if number == (len(turns) - 1 if original else last) else ""
            parts.append((f"{tools}[INST] {shown}{turn.content}[/INST]", False))
        elif turn.role == "tool":
            id = f', "call_id": "{turn.id}"' if turn.id else ""
            parts.append((f'[TOOL_RESULTS] {{"content": {dumped(turn.content)}{id}}}[/TOOL_RESULTS]', False))
        else:
            said = " " + turn.content.strip() if turn.content else ""
            calls = [
                f'{{"name": "{name}", "arguments": {dumped(arguments)}' + (f', "id": "{id}"' if id else "") + "}"
                for name, arguments, id in turn.calls
            ]
            said += f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else ""
            parts.append((f"{said}</s>", turn.trained))
    return parts


FAMILIES: dict[str, tuple[Family, Family]] = {
    "chatml": (chatml, chatml),
    "llama-3": (llama, lambda row: llama(row, tools=False)),
    "gemma": (gemma, lambda row: gemma(row, folds_system=False)),
    "mistral": (mistral, lambda row: mistral(row, original=True)),
    "qwen": (qwen, lambda row: qwen(row, images=False)),
}
"""How rows look under the template that Luthier brings, and under one in the style of the family's own."""
TEMPLATES = [(name, origin) for name in FAMILIES for origin in ("named", "own", "given")]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level BPE tokenizer that knows the control tokens of every family."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(keepends=True), trainer)
    return tokenizer


def fast(bpe: Tokenizer, chat_template: str | None = None) -> Any:
    tokenizer: Any = _FAST(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def chosen(bpe: Tokenizer, name: str, origin: str) -> tuple[Any, Template, Family]:
    """A tokenizer, the template that is chosen with it, and what is expected of it."""
    ours, own = FAMILIES[name]
    source = (FOLDER / "templates" / f"{name}.jinja").read_text().removesuffix("\n")
    if origin == "named":
        tokenizer = fast(bpe)
        return tokenizer, template_of(tokenizer, tokenization_pb2.Tokenization(chat_template_name=name)), ours
    if origin == "own":
        tokenizer = fast(bpe, source)
        return tokenizer, template_of(tokenizer), own
    tokenizer = fast(bpe, "{{ raise_exception('the given one goes first') }}")
    return tokenizer, template_of(tokenizer, tokenization_pb2.Tokenization(chat_template=source)), own


def tokens(parts: Parts, bpe: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of the whole text, and for each token whether any of its characters is to be trained."""
    characters = [trained for text, trained in parts for _ in text]
    encoding = bpe.encode("".join(text for text, _ in parts), add_special_tokens=False)
    return encoding.ids, [any(characters[start:end]) for start, end in encoding.offsets]


def expect(row: Row, family: Family, masking: Masking, bpe: Tokenizer) -> tuple[list[int], list[bool]] | str:
    """Ids and mask of a row, or the code of its problem."""
    if row.text is not None:
        return tokens([(row.text + "</s>", True)], bpe)
    if masking.train_on is TrainOn.LAST_TURN:
        last = max((n for n, turn in enumerate(row.turns) if turn.role == "assistant"), default=-1)
        turns = tuple(replace(turn, trained=turn.trained and n == last) for n, turn in enumerate(row.turns))
        row = replace(row, turns=turns)
    parts = family(row)
    if isinstance(parts, str):
        return parts
    if masking.train_on is TrainOn.ALL_TOKENS and not row.to_answer:
        parts = [("".join(text for text, _ in parts), True)]
    return tokens(parts, bpe)


def found(path: Path, tokenizer: Any, template: Template, masking: Masking = ASSISTANT, count: int = 1000) -> list[Any]:
    """Ids and mask of each of the first sequences of a file, or the code of its problem."""
    outcomes: list[Any] = []
    with records(path, Reading(columns=COLUMNS.get(path.name, {}))) as rows:
        for _, record, _ in rows:
            if len(outcomes) >= count:
                break
            assert not isinstance(record, Problem), record
            for passage in passages(record):
                try:
                    (example,) = tokenise([render(passage, template, masking)], tokenizer)
                except RowRefused as refusal:
                    outcomes.append(refusal.problem.code)
                    continue
                outcomes.append((example.input_ids.tolist(), example.trained.tolist()))
    return outcomes


def sample(file: str, scratch: Path) -> Path:
    """Where a sample lies; a folder with pictures is zipped first."""
    return zipped(FOLDER / "datasets" / file, "*", scratch) if file == "images" else FOLDER / "datasets" / file


def zipped(folder: Path, pattern: str, scratch: Path) -> Path:
    archive = scratch / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for top in sorted(folder.glob(pattern)):
            for path in [top] if top.is_file() else sorted(top.iterdir()):
                file.write(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("file", SAMPLES)
@pytest.mark.parametrize(("name", "origin"), TEMPLATES)
def test_every_format_trains_the_assistants_tokens_and_no_others(
    bpe: Tokenizer, tmp_path: Path, name: str, origin: str, file: str
) -> None:
    tokenizer, template, family = chosen(bpe, name, origin)
    expected = [expect(each, family, Masking(), bpe) for each in SAMPLES[file]]
    assert found(sample(file, tmp_path), tokenizer, template) == expected


@pytest.mark.parametrize("file", ["messages.jsonl", "weights.jsonl", "messages-tools.jsonl", "prompt-only.jsonl"])
@pytest.mark.parametrize("train_on", [TrainOn.LAST_TURN, TrainOn.ALL_TOKENS])
@pytest.mark.parametrize(("name", "origin"), TEMPLATES)
def test_last_turn_and_all_tokens_train_just_that(
    bpe: Tokenizer, name: str, origin: str, train_on: TrainOn, file: str
) -> None:
    tokenizer, template, family = chosen(bpe, name, origin)
    masking = Masking(train_on)
    expected = [expect(each, family, masking, bpe) for each in SAMPLES[file]]
    assert found(FOLDER / "datasets" / file, tokenizer, template, masking) == expected


@pytest.mark.parametrize("file", ["preference-sharegpt.jsonl", "unpaired.jsonl"])
def test_all_tokens_of_a_preference_are_those_of_the_answer(bpe: Tokenizer, file: str) -> None:
    tokenizer, template, family = chosen(bpe, "chatml", "own")
    expected = [expect(each, family, Masking(), bpe) for each in SAMPLES[file]]
    assert found(FOLDER / "datasets" / file, tokenizer, template, Masking(TrainOn.ALL_TOKENS)) == expected


RESPONSES = {
    "chatml": "<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
    "mistral": "[/INST]",
    "qwen": "<|im_start|>assistant\n",
}


@pytest.mark.parametrize(
    "file", ["messages.jsonl", "weights.jsonl", "sharegpt.json", "instruction.json", "messages-tools.jsonl"]
)
@pytest.mark.parametrize(("name", "origin"), TEMPLATES)
def test_a_response_template_trains_what_follows_it_through_the_end_of_the_turn(
    bpe: Tokenizer, name: str, origin: str, file: str
) -> None:
    if name == "mistral" and "tools" in file:
        pytest.skip("there an answer follows a result too, and not only a question")
    tokenizer, template, family = chosen(bpe, name, origin)
    expected = [expect(each, family, Masking(), bpe) for each in SAMPLES[file]]
    masking = Masking(response_template=RESPONSES[name])
    if name == "mistral":  # a trailing question is followed by nothing
        expected = expected[:3]
    assert found(FOLDER / "datasets" / file, tokenizer, template, masking)[: len(expected)] == expected


def test_what_no_token_ends_or_the_template_leaves_out_is_a_problem_of_the_row(bpe: Tokenizer) -> None:
    lost = FOLDER / "datasets" / "sharegpt.json"
    tokenizer, template, _ = chosen(bpe, "mistral", "own")
    with records(lost, Reading()) as rows:
        codes = []
        for _, record, _ in rows:
            assert not isinstance(record, Problem)
            (passage,) = passages(record)
            rendered = render(passage, template)
            (example,) = tokenise([rendered], tokenizer)
            codes.append([problem.code for problem in problems(rendered, example, template)])
    assert codes == [["TURN_NOT_RENDERED"], ["TURN_NOT_RENDERED"], [], []]


def samples_as_rows(name: str, folder: Path, count: int) -> list[Row]:
    """The first rows of a public sample as they should be read, written out once more."""
    text = (folder / name).read_text()
    values = [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)
    return [one for value in values[:count] for one in PUBLIC[name](value)]


def of_alpaca(value: dict[str, Any]) -> list[Row]:
    asked = value["instruction"] + ("\n\n" + value["input"] if value["input"] else "")
    return [row(user(asked), answer(value["output"]))]


def of_dpo(value: dict[str, Any]) -> list[Row]:
    names = {"human": user, "gpt": context, "system": system}
    turns = [names[turn["from"]](turn["value"]) for turn in value["conversations"]]
    return [row(*turns, answer(value[which]["value"])) for which in ("chosen", "rejected")]


def of_kto(value: dict[str, Any]) -> list[Row]:
    names = {"user": user, "assistant": context, "system": system}
    turns = [names[turn["role"]](turn["content"]) for turn in value["messages"]]
    return [row(*turns[:-1], answer(turns[-1].content))]


def of_glaive(value: dict[str, Any]) -> list[Row]:
    turns: list[Turn] = []
    for turn in value["conversations"]:
        match turn["from"]:
            case "human":
                turns.append(user(turn["value"]))
            case "gpt":
                turns.append(answer(turn["value"]))
            case "function_call":
                call = json.loads(turn["value"])
                turns.append(answer("", (call["name"], call["arguments"], "")))
            case "observation":
                turns.append(result(turn["value"]))
    listed = json.loads(value["tools"]) if value["tools"] else []
    return [row(*turns, tools=tuple({"type": "function", "function": each} for each in listed))]


def of_mllm(value: dict[str, Any]) -> list[Row]:
    names = {"user": user, "assistant": answer}
    turns = [names[turn["role"]](turn["content"].replace("<image>", IMAGE)) for turn in value["messages"]]
    return [row(*turns)]


PUBLIC: dict[str, Callable[[Any], list[Row]]] = {
    "alpaca_en_demo.json": of_alpaca,
    "identity.json": of_alpaca,
    "gsm8k_train.jsonl": lambda value: [row(user(value["question"]), answer(value["answer"]))],
    "c4_demo.jsonl": lambda value: [Row(text=value["text"])],
    "dpo_en_demo.json": of_dpo,
    "kto_en_demo.json": of_kto,
    "glaive_toolcall_en_demo.json": of_glaive,
    "mllm_demo.json": of_mllm,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", PUBLIC)
def test_public_samples_train_the_assistants_tokens_and_no_others(
    bpe: Tokenizer, samples: Path, tmp_path: Path, file: str, name: str
) -> None:
    expected_rows = samples_as_rows(file, samples, 25)
    path = zipped(samples, "mllm_demo*", tmp_path) if file == "mllm_demo.json" else samples / file
    for origin in ("named", "own"):
        tokenizer, template, family = chosen(bpe, name, origin)
        expected = [expect(each, family, Masking(), bpe) for each in expected_rows]
        assert found(path, tokenizer, template, count=len(expected)) == expected
