"""Chat templates that Luthier brings, by name, each with `{% generation %}` around what the assistant says.

They follow the layout of the model family they are named after. `llama-3` writes no dates, and `qwen` neither a system
turn of its own nor empty thoughts.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Named:
    """A template. tokens: control tokens that it always uses; tool_tokens and image_tokens: those for tools and
    images."""

    source: str
    tokens: tuple[str, ...]
    tool_tokens: tuple[str, ...] = ()
    image_tokens: tuple[str, ...] = ()


def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


NAMED = {
    "chatml": Named(_source("chatml"), ("<|im_start|>", "<|im_end|>")),
    "llama-3": Named(_source("llama-3"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": Named(_source("gemma"), ("<start_of_turn>", "<end_of_turn>")),
    "mistral": Named(
        _source("mistral"),
        ("[INST]", "[/INST]"),
        ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "qwen": Named(
        _source("qwen"),
        ("<|im_start|>", "<|im_end|>"),
        image_tokens=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    ),
}
