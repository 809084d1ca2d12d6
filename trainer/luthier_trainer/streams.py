"""Seeds of what is random in a job: nothing random is carried from one step to the next."""

import hashlib


def step_seed(seed: int, step: int) -> int:
    """The seed of what is random in an optimizer step: dropout draws the same after a resume, and whatever ran between
    two steps."""
    return int.from_bytes(hashlib.sha256(f"luthier {seed} {step}".encode()).digest()[:8], "little") >> 1
