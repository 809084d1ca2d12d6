"""Which weights are trained when only the last layers are."""

from torch import nn
from transformers import PreTrainedModel

from luthier_trainer.errors import TrainingError


def train_last(model: PreTrainedModel, count: int) -> None:
    """Freezes all but the last `count` decoder layers, the norm after the last one, and the head.

    Embeddings that are tied to the head are the head's weight: they are trained with it, in both their uses, and the
    backward pass goes down to them. Else it ends at the first layer that is trained. Raises TrainingError
    MODULE_NOT_FOUND for a model without so many layers.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    total = int(model.config.get_text_config().num_hidden_layers)
    stacks = [each for each in decoder.children() if isinstance(each, nn.ModuleList) and len(each) == total]
    if len(stacks) != 1 or count > total:
        found = f"{total} decoder layers" if len(stacks) == 1 else "no list of decoder layers that is known"
        raise TrainingError("MODULE_NOT_FOUND", f"train_last_layers is {count}, and the model has {found}.")
    model.requires_grad_(False)
    trained: list[nn.Module | None] = [*stacks[0][total - count :], model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    trained += [each for name, each in decoder.named_children() if _is_final_norm(name, each)]
    for each in trained:
        if each is not None:
            each.requires_grad_(True)


def _is_final_norm(name: str, module: nn.Module) -> bool:
    """Among a decoder's own children only the norm after its layers is one, but for a norm of the embeddings."""
    return "norm" in type(module).__name__.lower() and "emb" not in name
