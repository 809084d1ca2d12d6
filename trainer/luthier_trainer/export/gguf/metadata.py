"""What a GGUF file says about the model beside its weights and vocabulary."""

import importlib.metadata
import math

from gguf import GGML_QUANT_VERSION, GGUFWriter, RopeScalingType, size_label
from transformers import PretrainedConfig

from luthier_trainer.export.gguf.families import Family, head_size, key_heads, rope, window, window_cycle
from luthier_trainer.export.source import Tuned

_GEMMA3_CYCLE = 6


def describe_origin(writer: GGUFWriter, tuned: Tuned, parameters: int) -> None:
    """Where the model comes from: name, base model, licence, and what wrote the file."""
    writer.add_name(tuned.base_name.rsplit("/", 1)[-1] or tuned.name)
    writer.add_finetune(tuned.name)
    if parameters:
        writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_license(tuned.base_licence)
    if tuned.base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, tuned.base_name.rsplit("/", 1)[-1])
        if "/" in tuned.base_name and not tuned.base_name.startswith("builtin/"):
            writer.add_base_model_organization(0, tuned.base_name.split("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{tuned.base_name}")
        writer.add_base_model_version(0, tuned.base_revision)
    writer.add_string("luthier.version", importlib.metadata.version("luthier-trainer"))
    writer.add_string("luthier.model", tuned.name)


def describe_model(writer: GGUFWriter, family: Family, config: PretrainedConfig, rows: int) -> list[str]:
    """The numbers that llama.cpp computes with; `rows`: of the embedding. Returns what a user should know."""
    notes = []
    context = int(config.max_position_embeddings)
    seen = window(config)
    if seen is not None and family.windows is None and seen < context:
        notes.append(
            f"llama.cpp computes no sliding window in {config.model_type} models: the file's context is the window of "
            f"{seen:,} tokens, not {context:,}."
        )
        context = seen
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_heads(config))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    _describe_rope(writer, config)
    if family.windows is not None and seen is not None:
        writer.add_sliding_window(seen)
        cycle = window_cycle(config)
        if family.model_type == "gemma3_text" and cycle not in (None, _GEMMA3_CYCLE):
            writer.add_sliding_window_pattern(cycle)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return notes


def describe_types(writer: GGUFWriter, file_type: int) -> None:
    """The type of the weights. Written last, where llama.cpp's quantisation puts it."""
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_type)


def _describe_rope(writer: GGUFWriter, config: PretrainedConfig) -> None:
    parameters = rope(config)
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    nested = getattr(config, "rope_parameters", None) or {}
    if "sliding_attention" in nested:
        writer.add_rope_freq_base_swa(float(rope(config, "sliding_attention")["rope_theta"]))
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        factor = float(parameters["factor"])
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(original))
        attention = parameters.get("attention_factor")
        if attention is not None:  # llama.cpp multiplies by what transformers takes when none is given
            writer.add_rope_scaling_attn_factors(float(attention) / (0.1 * math.log(factor) + 1.0))
