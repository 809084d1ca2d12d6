"""What a model is computed with beside its weights.

Answers to short rows do not tell all of it: a norm's epsilon, another base of the rotary embedding or a sliding window
that got lost may change less than quantised weights do. These numbers are therefore compared as they are written.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from luthier_trainer.export.proof.artefact import NotLoaded

_OWN = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "quantization_config",
        "tie_word_embeddings",  # compared by what it does: an untied head is in the files
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)
"""What an export may say otherwise than its base, or what other checks compare."""


def require_same_config(base: Path, exported: Path) -> None:
    """That config.json of a whole model says what the base's does. Raises NotLoaded with the first difference."""
    try:
        own, other = (
            AutoConfig.from_pretrained(each, trust_remote_code=False, local_files_only=True).get_text_config().to_dict()
            for each in (base, exported)
        )
    except (OSError, ValueError, KeyError) as error:
        raise NotLoaded(f"its config.json cannot be read: {type(error).__name__}") from error
    for name in sorted((own.keys() | other.keys()) - _OWN):
        if not name.startswith("_") and own.get(name) != other.get(name):
            raise NotLoaded(f"its {name} is {other.get(name)!r}, and the tuned model's {own.get(name)!r}")


def require_same_metadata(base: Path, value_of: Callable[[str], str]) -> None:
    """The same of a GGUF file, of what its family's graph in llama.cpp asks the file for. `value_of`: a key's value as
    llama.cpp prints it, empty for none. Families that are not written here are not looked at. Raises NotLoaded."""
    from luthier_trainer.export.gguf.families import FAMILIES

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        return
    for key, expected in _expected(config, windows=family.windows is not None).items():
        found = value_of(f"{family.architecture}.{key}")
        # llama.cpp prints six decimals
        if not _is_near(found, expected):
            raise NotLoaded(f"its {key} is {found or 'not there'}, and the tuned model's {expected:g}")


def _expected(config: PretrainedConfig, *, windows: bool) -> Mapping[str, float]:
    from luthier_trainer.export.gguf.families import rope, window

    found: dict[str, Any] = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope(config).get("rope_theta"),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention.sliding_window": window(config) if windows else None,
    }
    if rope(config).get("rope_type") in ("linear", "yarn"):
        found["rope.scaling.factor"] = rope(config).get("factor")
    return {key: float(value) for key, value in found.items() if value}


def _is_near(found: str, expected: float) -> bool:
    try:
        return math.isclose(float(found), expected, rel_tol=1e-6, abs_tol=6e-7)
    except ValueError:
        return False
