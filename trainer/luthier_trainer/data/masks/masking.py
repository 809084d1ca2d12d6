"""Which tokens of a row are to be trained: `luthier.v1.Tokenization`'s part of it as a value."""

from dataclasses import dataclass
from enum import StrEnum

from luthier.v1 import tokenization_pb2


class TrainOn(StrEnum):
    """Which turns are trained. Each is trained with the token that ends it."""

    ASSISTANT = "assistant"
    LAST_TURN = "last_turn"
    ALL_TOKENS = "all_tokens"


@dataclass(frozen=True, slots=True)
class Masking:
    """What is trained. response_template: where given, what follows this text, in place of train_on."""

    train_on: TrainOn = TrainOn.ASSISTANT
    response_template: str = ""

    @classmethod
    def from_proto(cls, tokenization: tokenization_pb2.Tokenization) -> "Masking":
        """The same from the contract's message; what it leaves open is the assistant's."""
        train_on = TrainOn.ASSISTANT
        if tokenization.train_on:
            name = tokenization_pb2.TrainOn.Name(tokenization.train_on)
            train_on = TrainOn(name.removeprefix("TRAIN_ON_").lower())
        return cls(train_on, tokenization.response_template)
