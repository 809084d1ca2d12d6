"""A tiny random model of each family, from transformers' own configurations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from fidelity.tiny import cast
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
_SPLIT = ("down_proj", "gate_proj", *_ATTENTION, "up_proj")
_NEOX = ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value")
_COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A family and what the engine must do with it.

    config: the name of transformers' configuration class. tolerance: the largest relative error; 1e-10 in 64 bits but
    for a model that itself computes parts in 32. documents, fused: the way that must be chosen. reason: what the note
    says about padding. targets: what all-linear adapts.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-10
    documents: bool = True
    fused: bool = True
    reason: str = ""
    targets: tuple[str, ...] = tuple(sorted(_SPLIT))

    def configuration(self, **changes: Any) -> PretrainedConfig:
        """The configuration, with changes."""
        make: Callable[..., PretrainedConfig] = getattr(transformers, self.config)
        return make(**_COMMON | self.options | changes)

    def model(self, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
        """The same random model each time. No bias is zero and no norm is one, so that each of them matters."""
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            self.configuration(**changes)
        )
        with torch.no_grad():
            for each in model.parameters():
                if each.ndim < 2:
                    each.add_(torch.randn_like(each), alpha=0.1)
        return cast(model, dtype)


_EAGER_EXPERTS = {"experts_implementation": "eager"}  # the grouped product knows no 64 bits
_IN_32 = 1e-5
"""For models that compute norms or the softmax in 32 bits whatever the weights are."""

FAMILIES = [
    Family("llama", "LlamaConfig"),
    Family(
        "llama-3",
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    Family("mistral", "MistralConfig", {"sliding_window": None}),
    Family("mistral-windows", "MistralConfig", {"sliding_window": 8}),
    Family("qwen-2", "Qwen2Config"),
    Family("qwen-2-windows", "Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Family("qwen-3", "Qwen3Config", {"head_dim": 16}),
    Family("gemma", "GemmaConfig", {"head_dim": 16}, _IN_32),
    Family(
        "gemma-2",
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        _IN_32,
    ),
    Family(
        "gemma-3",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _IN_32,
    ),
    Family("phi-3", "Phi3Config", {"sliding_window": 20}, targets=("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
    Family(
        "phi-3-long",
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.5, 3.0, 4.0],
                "factor": 8.0,
            },
            "original_max_position_embeddings": 16,
        },
        targets=("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
    ),
    Family("smollm-3", "SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    Family(
        "gpt-2",
        "GPT2Config",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        targets=("c_attn", "c_fc", "c_proj"),
    ),
    Family("gpt-neox", "GPTNeoXConfig", {"rotary_pct": 0.5, "use_parallel_residual": True}, targets=_NEOX),
    Family(
        "mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "sliding_window": None, **_EAGER_EXPERTS},
        targets=("down_proj", "gate", "gate_up_proj", *_ATTENTION),
    ),
    Family(
        "qwen-2-moe",
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            **_EAGER_EXPERTS,
        },
        targets=("down_proj", "gate_proj", *_ATTENTION, "shared_expert_gate", "up_proj"),
    ),
    Family(
        "granite", "GraniteConfig", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
    ),
    Family("cohere-2", "Cohere2Config", {"logit_scale": 0.3, "sliding_window": 8}, _IN_32),
    Family(
        "lfm-2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
        documents=False,
        reason="layers of type conv",
        targets=("in_proj", "k_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3"),
    ),
    Family(
        "bloom",
        "BloomConfig",
        {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        _IN_32,
        documents=False,
        reason="its attention cannot be switched",
        targets=_NEOX,
    ),
    Family(
        "gpt-j",
        "GPTJConfig",
        {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        _IN_32,
        documents=False,
        reason="its attention cannot be switched",
        targets=("fc_in", "fc_out", "k_proj", "out_proj", "q_proj", "v_proj"),
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8, **_EAGER_EXPERTS},
        documents=False,
        reason="the model's attention takes s_aux",
        targets=_ATTENTION,
    ),
]
