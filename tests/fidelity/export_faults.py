"""What goes wrong in exports elsewhere, done to one on purpose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
Weights = dict[str, torch.Tensor]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[Weights], None], name: str = WEIGHTS) -> None:
    """Changes a file of weights in place."""
    weights = load_file(folder / name)
    change(weights)
    save_file({each: tensor.contiguous() for each, tensor in weights.items()}, folder / name, {"format": "pt"})


def template_swapped(folder: Path) -> None:
    """Another family's template."""
    other = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(other, encoding="utf-8")


def template_lost(folder: Path) -> None:
    """No template at all."""
    (folder / "chat_template.jinja").unlink()


def system_turn_lost(folder: Path) -> None:
    """A template that knows no system turns."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8")
    others = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    path.write_text(others + source, encoding="utf-8")


def end_token_renamed(folder: Path) -> None:
    """The tokenizer calls another token the end, which other programs ask it for."""
    edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token="<|endoftext|>"))


def ids_shifted(folder: Path) -> None:
    """Every ordinary token has the id of the one before it."""

    def shift(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        added = {each["content"] for each in tokenizer["added_tokens"]}
        names = sorted((each for each in vocabulary if each not in added), key=vocabulary.__getitem__)
        ids = [vocabulary[each] for each in names]
        vocabulary.update(zip(names, ids[-1:] + ids[:-1], strict=True))

    edit_json(folder / "tokenizer.json", shift)


def merge_removed(folder: Path) -> None:
    """The tokenizer forgot the first pair that it joins."""

    def remove(tokenizer: dict[str, Any]) -> None:
        del tokenizer["model"]["merges"][0]

    edit_json(folder / "tokenizer.json", remove)


def end_of_turn_lost(folder: Path) -> None:
    """Generation stops at another token than the one that training taught."""

    def lose(settings: dict[str, Any]) -> None:
        settings["eos_token_id"] = 0

    edit_json(folder / "generation_config.json", lose)
    edit_json(folder / "config.json", lose)


def end_in_the_middle(folder: Path) -> None:
    """A word that answers are made of ends them, too."""
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    edit_json(folder / "generation_config.json", lambda settings: settings.update(eos_token_id=[2, words["\u0120two"]]))


def head_dropped(folder: Path) -> None:
    """A head that was trained apart from the embedding is taken for tied."""

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True

    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))  # type: ignore[arg-type]
    edit_json(folder / "config.json", tie)


def layer_swapped(folder: Path) -> None:
    """Two layers have each other's weights in one place."""

    def swap(weights: Weights) -> None:
        one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        weights[one], weights[other] = weights[other], weights[one]

    edit_weights(folder, swap)


def norm_off(folder: Path) -> None:
    """A norm's weights lack the one that some families leave out."""

    def reset(weights: Weights) -> None:
        weights["model.norm.weight"] += 1

    edit_weights(folder, reset)


def half_rotated(folder: Path) -> None:
    """Queries in the order of the other way to rotate them."""

    def turn(weights: Weights) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        rows, columns = weights[name].shape
        weights[name] = weights[name].view(2, rows // 2, columns).transpose(0, 1).reshape(rows, columns)

    edit_weights(folder, turn)


def rotated_otherwise(folder: Path) -> None:
    """Another base of the rotary embedding."""
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=20000.0))


def epsilon_changed(folder: Path) -> None:
    """Another library's default of a norm's epsilon."""
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-5))


def window_changed(folder: Path) -> None:
    """A context that the model was not made for."""
    edit_json(folder / "config.json", lambda config: config.update(max_position_embeddings=1 << 17))
