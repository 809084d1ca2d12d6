"""The vocabulary, chat template and special tokens of a tuned model, as its GGUF file holds them."""

import re
from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from luthier_trainer.data.masks.template import Template, template_of
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.gguf.tokens import proven
from luthier_trainer.export.gguf.vocabulary import Vocabulary, read, unsupported
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.surroundings import end_of_turn, end_tokens, load_tokenizer
from luthier_trainer.stop import Check

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def vocabulary_of(tuned: Tuned, config: PretrainedConfig, rows: int, check: Check) -> Vocabulary:
    """The vocabulary of a tuned model, proven with llama.cpp, for an embedding of so many rows. Raises TrainingError
    EXPORT_UNSUPPORTED, MODEL_NOT_FOUND, and what `check` raises."""
    tokenizer = load_tokenizer(tuned)
    special = _special(tuned, config, tokenizer)
    template = template_of_model(tokenizer)
    source = for_others(template.source) if template is not None else ""
    return proven(read(tokenizer, rows, special, source), tokenizer, check)


def template_of_model(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The chat template that the model was trained with; None for a tokenizer that has none."""
    try:
        found = template_of(tokenizer)
    except TrainingError:
        return None
    return found if found.source else None


def for_others(source: str) -> str:
    """A chat template for other programs: `generation` blocks, which only trainers know, are blocks that are always
    written."""
    return _GENERATION.sub(_always, source)


def _always(block: re.Match[str]) -> str:
    before, end, after = block.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


def _special(tuned: Tuned, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Ids by llama.cpp's names. What ends a turn is `eot` beside `eos`, and both end generation; without an `eos`
    llama.cpp would take a token of its own choice."""
    ends = end_tokens(tuned, config)
    if not ends:
        raise unsupported("one without a token that ends a text")
    eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else ends[0]
    turn = end_of_turn(tokenizer)
    others = dict.fromkeys(each for each in (turn, *ends) if each is not None and each != eos)
    special = {"eos": eos, **dict(zip(("eot", "eom"), others, strict=False))}
    for name in ("bos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(token, int):
            special[name] = token
    return special


def require_rows(vocabulary: Vocabulary) -> None:
    """That the tokens that end texts have rows. Raises TrainingError EXPORT_UNSUPPORTED."""
    if "eos" not in vocabulary.special:
        raise TrainingError(
            "EXPORT_UNSUPPORTED",
            "The token that ends texts is not among those that the model has embeddings for.",
            "Train with a tokenizer whose tokens the model has.",
        )
