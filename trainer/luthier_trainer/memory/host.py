"""What training takes of the host's memory, the loaded process included."""

import torch

from luthier_trainer.memory.need import Need

LOADED_PROCESS = 480 << 20
"""Resident bytes of a trainer that imported torch, transformers and peft and has a tokenizer, on Linux."""


def host_need(need: Need, device: torch.device, peak: int) -> int:
    """Bytes of the host: on a CPU the loaded process and `peak`, what training takes there; on CUDA the process and
    what passes through the host while the model is loaded or saved."""
    if device.type == "cpu":
        return LOADED_PROCESS + peak
    return LOADED_PROCESS + max(need.load, need.save - need.fixed)
