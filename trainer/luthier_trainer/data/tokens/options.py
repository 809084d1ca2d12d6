"""How rows become tokens, beside the template: what two jobs must share to share tokenised rows."""

from dataclasses import dataclass
from typing import Any

from luthier.v1 import tokenization_pb2
from luthier_trainer.data.masks.masking import Masking, TrainOn
from luthier_trainer.data.tokens.overlong import Overlong


@dataclass(frozen=True, slots=True)
class Options:
    """max_length: of an example, in tokens; overlong: what happens to longer rows; masking: what is trained."""

    max_length: int
    overlong: Overlong
    masking: Masking

    @classmethod
    def of(cls, tokenization: tokenization_pb2.Tokenization, max_length: int) -> "Options":
        """The options that a tokenization asks for."""
        return cls(max_length, Overlong.from_proto(tokenization.overlong), Masking.from_proto(tokenization))

    def tokenization(self, only_texts: bool) -> tokenization_pb2.Tokenization:
        """The options as the contract has them, nothing left open; where the template is from is not known here."""
        train_on = TrainOn.ALL_TOKENS if only_texts else self.masking.train_on
        return tokenization_pb2.Tokenization(
            train_on=tokenization_pb2.TrainOn.Value(f"TRAIN_ON_{train_on.name}"),
            response_template=self.masking.response_template,
            overlong=self.overlong.to_proto(),
        )


def longest(max_length: int, config: Any) -> int:
    """The longest example in tokens: `max_length`, and no more than the model of this configuration was made for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, limit) if limit else max_length
