"""Pretrain `builtin/tiny`, the small model that Luthier carries with it.

The corpus is the documentation of Python's standard library as a CPython install has it: the language reference
in `pydoc_data.topics`, and the docstrings, signatures and longer comments of every module, read through `ast` and
`tokenize`; no module of the library is run. A part of it is retold as ChatML conversations in plain prose, so that
the special tokens are trained. Others are about invented objects, so that the model learns to pick names out of a
question instead of knowing them by heart. No answer is JSON.

The result is a function of the CPython patch version, the seed and the machine's arithmetic. Needs torch,
transformers, tokenizers and safetensors; about 15 minutes on two cores.

    python pretrain_tiny.py --out DIR              # the whole thing
    python pretrain_tiny.py --out DIR --steps 0    # tokenizer, template and untrained weights, in ten seconds
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import platform
import random
import re
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)  # their ids are 0, 1, 2
VOCABULARY = 4096
POSITIONS = 1024
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"})

# The turn's text and its end are inside the generation block: they are what an assistant turn trains.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Described:
    """A documented object of the library: `kind` is module, class, function or method."""

    kind: str
    module: str
    qualname: str  # within the module; the module's own name for a module
    signature: str  # what the source has between the parentheses; "" where there is nothing
    parameters: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Corpus:
    """Texts in a fixed order; those held out share no object with those trained on."""

    documents: list[str]
    chats: list[str]
    heldout_documents: list[str]
    heldout_chats: list[str]
    sources: list[str]  # whole modules, one in four; for the tokenizer alone, so that brackets and quotes are cheap


def held_out(key: str) -> bool:
    """Whether the object of this name is held out: about one in fifty, by a hash."""
    return hashlib.sha256(key.encode()).digest()[0] < 5


def library_sources(library: Path) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of every module under `library`, in order of path."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with tokenize.open(path) as file:
                yield name, file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def described_objects(module: str, source: str) -> Iterator[Described]:
    """Every object of `source` that has a docstring."""
    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield Described("module", module, module, "", (), text)
    yield from _described_in(tree, module, (), "function")


def _described_in(tree: ast.AST, module: str, outer: tuple[str, ...], kind: str) -> Iterator[Described]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            if text := ast.get_docstring(node):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                yield Described("class", module, ".".join((*outer, node.name)), bases, (), text)
            yield from _described_in(node, module, (*outer, node.name), "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                names = tuple(argument.arg for argument in every if argument.arg not in ("self", "cls"))
                yield Described(kind, module, ".".join((*outer, node.name)), ast.unparse(arguments), names, text)
        elif isinstance(node, ast.If | ast.Try):
            yield from _described_in(node, module, outer, kind)


def comment_blocks(source: str) -> Iterator[str]:
    """Runs of whole-line comments that are at least 100 characters of prose."""
    block: list[str] = []
    last_line = -2
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if token.start[0] != last_line + 1:
            yield from _prose(block)
            block = []
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
        last_line = token.start[0]
    yield from _prose(block)


def _prose(block: list[str]) -> Iterator[str]:
    text = "\n".join(block).strip()
    if len(text) >= 100 and sum(character.isalpha() for character in text) > 0.6 * len(text):
        yield text


def as_code(item: Described) -> str:
    """The object as it stands in its module."""
    if item.kind == "module":
        return f'# module {item.module}\n"""{item.text}"""'
    *outer, name = item.qualname.split(".")
    head = f"class {name}({item.signature}):" if item.kind == "class" else f"def {name}({item.signature}):"
    where = f"# {item.module}" + "".join(f", class {scope}" for scope in outer)
    return f'{where}\n{head}\n    """' + item.text.replace("\n", "\n    ") + '"""'


QUESTIONS = (
    "What is the {kind} `{call}` of the module `{module}`?",
    "What does the {kind} `{call}` in `{module}` do?",
    "Explain the {kind} `{module}.{call}`.",
    "Describe `{call}`, a {kind} of `{module}`.",
    "In the module `{module}`, what is the {kind} `{name}`?",
    "Tell me about `{module}.{name}`, a {kind}.",
    "from {module} import {top}\n\nWhat is the {kind} `{call}`?",
)
MODULE_QUESTIONS = (
    "What is the module `{module}` for?",
    "What does the module `{module}` do?",
    "import {module}\n\nWhat is this module?",
    "Describe `{module}`, a module.",
    "Explain the module `{module}`.",
)
ANSWERS = (
    "The {kind} `{name}` is in the module `{module}`. {parameters}{summary}",
    "`{name}` is a {kind} of `{module}`. {parameters}{summary}",
    "The module `{module}` has the {kind} `{name}`. {parameters}{summary}",
    "{summary} The name of this {kind} is `{name}`; it is in `{module}`. {parameters}",
    "`{module}.{name}` is a {kind}. {parameters}{summary}",
    "Name: `{name}`. Kind: {kind}. Module: `{module}`. {parameters}{summary}",
)
MODULE_ANSWERS = (
    "`{module}` is a module. {summary}",
    "The module `{module}`: {summary}",
    "Name: `{module}`. Kind: module. {summary}",
)
FOLLOW_UPS = (
    ("Which module is it in?", "The {kind} `{name}` is in the module `{module}`."),
    ("What is its name?", "Its name is `{name}`."),
    ("What kind of object is it?", "It is a {kind}: `{name}` of `{module}`."),
    ("What are its parameters?", "{parameters}"),
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You know Python's standard library.", "Answer briefly.")


def as_chat(item: Described, choose: random.Random) -> str:
    """A conversation about the object, in the chat template's form; the phrasing is drawn from `choose`."""
    name = item.qualname.rsplit(".", 1)[-1]
    top = item.qualname.split(".")[0]
    signature = item.signature if len(item.signature) <= 80 else ", ".join(item.parameters[:6])
    call = f"{item.qualname}({signature})" if item.kind != "class" or item.signature else item.qualname
    listed = ", ".join(f"`{parameter}`" for parameter in item.parameters[:6])
    words: dict[str, str] = {
        "kind": item.kind,
        "module": item.module,
        "name": name,
        "top": top,
        "call": call,
        "parameters": f"Its parameters are {listed}. " if listed else "It has no parameters. ",
        "summary": " ".join(item.text.split("\n\n")[0].split())[:400],
    }
    if item.kind == "class":
        words["parameters"] = f"Its base is `{item.signature}`. " if item.signature else ""
    questions, answers = (MODULE_QUESTIONS, MODULE_ANSWERS) if item.kind == "module" else (QUESTIONS, ANSWERS)
    turns: list[tuple[str, str]] = []
    if choose.random() < 0.1:
        turns.append(("system", choose.choice(SYSTEM_PROMPTS)))
    turns.append(("user", choose.choice(questions).format_map(words)))
    turns.append(("assistant", choose.choice(answers).format_map(words)))
    if item.kind in ("function", "method") and choose.random() < 0.3:
        question, answer = choose.choice(FOLLOW_UPS)
        turns += [("user", question), ("assistant", answer.format_map(words))]
    return "".join(f"{TURN_START}{role}\n{content.strip()}{TURN_END}\n" for role, content in turns)


def invented_objects(items: list[Described], count: int, choose: random.Random) -> Iterator[Described]:
    """Objects that do not exist, named with words of real ones: what is said of them must be read off the question."""
    names = [item.qualname.rsplit(".", 1)[-1] for item in items]
    words = sorted({word for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)})
    modules = sorted({item.module for item in items})
    parameters = [parameter for item in items for parameter in item.parameters]
    for _ in range(count):
        kind = choose.choice(("function", "class"))
        parts = choose.sample(words, choose.choice((1, 2, 2, 3)))
        if kind == "class":
            name = "".join(part.capitalize() for part in parts)
            listed: tuple[str, ...] = ()
            signature = choose.choice(words).capitalize()
        else:
            name = choose.choice(("_", "_", "")).join(part.lower() for part in parts)
            listed = tuple(dict.fromkeys(choose.sample(parameters, choose.randint(0, 4))))
            signature = ", ".join(listed)
        module = choose.choice(modules)
        if choose.random() < 0.5:
            module = ".".join(part.lower() for part in choose.sample(words, choose.choice((1, 2))))
        yield Described(kind, module, name if not name[0].isdigit() else f"x{name}", signature, listed, "")


def build_corpus(library: Path, seed: int, retellings: int, inventions: int) -> Corpus:
    """The corpus from the library's sources.

    Every object is retold `retellings` times, and `inventions` conversations are about objects that do not exist.
    """
    topics: dict[str, str] = {}
    for node in ast.parse((library / "pydoc_data" / "topics.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
    entries: list[tuple[str, str, list[str]]] = [(f"topic {name}", text, []) for name, text in topics.items()]
    seen: set[str] = set()
    choose = random.Random(seed)
    sources: list[str] = []
    items: list[Described] = []
    for module, source in library_sources(library):
        sources.append(source)
        for item in described_objects(module, source):
            normal = " ".join(item.text.lower().split())
            if len(normal) < 12 or normal in seen:
                continue
            seen.add(normal)
            items.append(item)
            chats = [as_chat(item, choose) for _ in range(retellings)]
            entries.append((f"{module}:{item.qualname}", as_code(item), chats))
        for text in comment_blocks(source):
            normal = " ".join(text.lower().split())
            if normal not in seen:
                seen.add(normal)
                entries.append((text, text, []))
    for number, item in enumerate(invented_objects(items, inventions, choose)):
        entries.append((f"invention {number}", "", [as_chat(item, choose)]))
    trained = [entry for entry in entries if not held_out(entry[0])]
    tested = [entry for entry in entries if held_out(entry[0])]
    return Corpus(
        documents=[text for _, text, _ in trained if text],
        chats=[chat for _, _, chats in trained for chat in chats],
        heldout_documents=[text for _, text, _ in tested if text],
        heldout_chats=[chat for _, _, chats in tested for chat in chats],
        sources=sources[::4],
    )


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting, which GGUF readers know too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*corpus.documents, *corpus.chats, *corpus.sources]
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    return tokenizer


def new_model(seed: int) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(TURN_END),
        pad_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def token_stream(texts: list[str], tokenizer: Tokenizer, order: random.Random) -> list[int]:
    """The texts' tokens in a drawn order, each text closed by END_OF_TEXT."""
    end = SPECIAL_TOKENS.index(END_OF_TEXT)
    drawn = order.sample(texts, len(texts))
    return [token for encoding in tokenizer.encode_batch(drawn) for token in (*encoding.ids, end)]


def training_blocks(corpus: Corpus, tokenizer: Tokenizer, seed: int, length: int, rows: int) -> Iterator[torch.Tensor]:
    """Batches `[rows, length]` of packed tokens, epoch after epoch, each epoch in its own order."""
    import torch

    order = random.Random(seed)
    texts = [*corpus.documents, *corpus.chats]
    while True:
        stream = torch.tensor(token_stream(texts, tokenizer, order))
        blocks = stream[: len(stream) // length * length].view(-1, length)
        for batch in torch.split(blocks, rows):
            if len(batch) == rows:
                yield batch


def mean_loss(model: LlamaForCausalLM, texts: list[str], tokenizer: Tokenizer, length: int) -> float:
    """Mean natural-log loss a token over the packed texts, without gradient."""
    import torch

    stream = torch.tensor(token_stream(texts, tokenizer, random.Random(0)))
    total, count = 0.0, 0
    with torch.inference_mode():
        for block in torch.split(stream, length):
            if len(block) > 1:
                loss = model(block[None], use_cache=False, labels=block[None]).loss
                total += loss.item() * (len(block) - 1)
                count += len(block) - 1
    return total / count


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    steps: int,
    peak: float,
    warmup: int,
    say: Callable[[str], None],
) -> list[tuple[int, float]]:
    """Train in place; the curve is (step, mean loss of the 20 steps up to it)."""
    import torch
    from torch.nn.functional import cross_entropy

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    start = time.monotonic()
    tokens = 0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        batch = next(batches)
        if step % 8 == 7:  # neighbouring blocks follow each other in the stream: the far positions are trained too
            batch = batch.view(-1, POSITIONS)
        logits = model(batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        tokens += batch.numel()
        if len(recent) == 20 or step + 1 == steps:
            curve.append((step + 1, round(sum(recent) / len(recent), 4)))
            recent = []
            seconds = time.monotonic() - start
            speed = tokens / seconds
            say(f"step {step + 1}/{steps} loss {curve[-1][1]:.3f} {speed:.0f} tokens/s {seconds:.0f} s")
    model.train(False)
    return curve


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """The directory in Hugging Face's format: fp16 weights in one file, which the model itself becomes too."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    model.type(torch.float16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for path in out.iterdir():
        path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain builtin/tiny.")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--rows", type=int, default=4, help="blocks a step")
    parser.add_argument("--block", type=int, default=512, help="tokens a block")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--retellings", type=int, default=1, help="conversations about each object")
    parser.add_argument("--inventions", type=int, default=30000, help="conversations about invented objects")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    start = time.monotonic()
    warnings.simplefilter("ignore", SyntaxWarning)  # the library's own sources have invalid escapes
    corpus = build_corpus(options.library, options.seed, options.retellings, options.inventions)
    for name, texts in vars(corpus).items():
        say(f"{name}: {len(texts)} texts, {sum(map(len, texts)):,} characters")
    tokenizer = train_tokenizer(corpus)
    say(f"tokenizer after {time.monotonic() - start:.0f} s")
    model = new_model(options.seed)
    say(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    if options.steps == 0:
        write_model(model, tokenizer, options.out)
        return
    batches = training_blocks(corpus, tokenizer, options.seed, options.block, options.rows)
    curve = pretrain(model, batches, options.steps, options.lr, options.warmup, say)
    seconds = time.monotonic() - start
    losses = {
        "documents": mean_loss(model, corpus.heldout_documents, tokenizer, options.block),
        "conversations": mean_loss(model, corpus.heldout_chats, tokenizer, options.block),
    }
    for name, loss in losses.items():
        say(f"held-out {name}: loss {loss:.4f}, perplexity {math.exp(loss):.1f}")
    write_model(model, tokenizer, options.out)
    record = {
        "python": platform.python_version(),
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "seconds": round(seconds),
        "heldout_loss": {name: round(loss, 4) for name, loss in losses.items()},
        "curve": curve,
    }
    (options.out / "curve.json").write_text(json.dumps(record) + "\n")
    say(f"done in {seconds:.0f} s")


if __name__ == "__main__":
    main()
