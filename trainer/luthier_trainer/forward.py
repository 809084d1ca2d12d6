"""How a micro-batch goes through a model: which attention and which head, decided by what the model really computes."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from luthier_trainer.attention import ATTENTION, IN_BLOCKS, document_arguments
from luthier_trainer.flatten import MicroBatch
from luthier_trainer.loss import Shaping, score, scored_cross_entropy


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The model's head if it is a Linear and nothing else, perhaps saved whole by PEFT; None when anything wraps it."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or len(head.active_adapters) != 1:
            return None
        head = head.modules_to_save[head.active_adapters[0]]
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
        return None
    return head


def shaping_of(model: PreTrainedModel) -> Shaping:
    """What the model's configuration says becomes of its head's product; the probe compares before it is believed.

    `final_logit_softcapping`: Gemma's cap; `logits_scaling`: Granite's divisor; `logit_scale`: Cohere's factor.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Shaping(scale, float(cap) if cap else None)


@dataclass(frozen=True)
class Forward:
    """The way through `model`, a causal language model whose adapters, if any, are already in its modules.

    documents: micro-batches are flattened and attention is per document; else they are padded. fused_head: hidden
    states come from the decoder and the loss from chunks of a plain head and its `shaping_of`; else the model's own
    forward gives the logits of the scored rows. label_smoothing: the share of a target's probability that training
    spreads over the vocabulary.
    """

    model: PreTrainedModel
    documents: bool
    fused_head: bool
    label_smoothing: float = 0.0

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the cross-entropies of the batch's targets, smoothed, differentiable."""
        if not self.fused_head:
            logits = self.logits(batch)
            return F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=self.label_smoothing)
        head = self._head()
        hidden, shaping = self.hidden(batch), shaping_of(self.model)
        return scored_cross_entropy(hidden, head.weight, head.bias, batch.targets, shaping, self.label_smoothing)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of cross-entropies, targets that the model puts first), without smoothing and without a gradient."""
        if not self.fused_head:
            logits = self.logits(batch)
            loss = F.cross_entropy(logits, batch.targets, reduction="sum")
            return loss, (logits.argmax(-1) == batch.targets).sum()
        head = self._head()
        return score(self.hidden(batch), head.weight, head.bias, batch.targets, shaping_of(self.model))

    def _head(self) -> nn.Linear:
        head = plain_head(self.model)
        if head is None:
            raise RuntimeError("the model's head was changed after the plan was made")
        return head

    def _arguments(self, batch: MicroBatch) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if self.documents:
            return arguments | document_arguments(batch.lengths, batch.input_ids.device)
        return arguments | {"attention_mask": batch.attention_mask}

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """[n, H] hidden states that predict the targets."""
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        hidden = decoder(**self._arguments(batch)).last_hidden_state
        selected: torch.Tensor = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.scored)
        return selected

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """[n, V] logits, in at least 32 bits, by the model's own forward: on the scored rows alone where it can
        select."""
        arguments = self._arguments(batch)
        selects = len(batch.input_ids) == 1 and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if selects:
            arguments["logits_to_keep"] = batch.scored
        logits: torch.Tensor = self.model(**arguments).logits
        logits = logits.reshape(-1, logits.shape[-1])
        if not selects:
            logits = logits.index_select(0, batch.scored)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Switches the attention of a model and of the models inside it."""
    model.set_attn_implementation(implementation)


DOCUMENTS = ATTENTION
"""The name of attention per document, for `set_attention`."""

DOCUMENTS_IN_BLOCKS = IN_BLOCKS
"""The name of attention per document in blocks of products."""
