"""Everything that makes a model's own modules faster and leaves what they compute as it is.

Modules stay the model's, and weights where they are; single modules get another `forward`, each only where a probe or
its type proves that it computes the same. What is not proven keeps its own.
"""

from torch import nn

from luthier_trainer import gated, lora, norms, rotary


def speed_up(model: nn.Module) -> None:
    """Makes the model faster, once its weights have the precision that it will train in."""
    lora.speed_up(model)
    norms.speed_up(model)
    gated.speed_up(model)
    rotary.speed_up(model)
