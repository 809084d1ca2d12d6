"""AdamW with clipping, on the flat masters of one job."""

from dataclasses import dataclass

import torch

from luthier_trainer.masters import Masters

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamSettings:
    """What AdamW is made with. The second factors of an adapter learn at `second_factor_rate` times the rate (LoRA+,
    Hayou et al. 2024, arXiv 2402.12354)."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    second_factor_rate: float = 1.0


class Optimizer:
    """One job's AdamW: weight decay on matrices alone, the gradient clipped by its global norm."""

    def __init__(self, masters: Masters, settings: AdamSettings) -> None:
        self._masters = masters
        self._max_norm = settings.max_grad_norm
        self._parts = [
            (slice(0, masters.first), settings.weight_decay, 1.0),
            (slice(masters.first, masters.decayed), settings.weight_decay, settings.second_factor_rate),
            (slice(masters.decayed, len(masters)), 0.0, 1.0),
        ]
        self._parts = [each for each in self._parts if each[0].stop > each[0].start]
        groups = []
        for part, decay, _ in self._parts:
            values = torch.nn.Parameter(masters.values[part])
            values.grad = masters.gradients[part]
            groups.append({"params": [values], "weight_decay": decay})
        self._adam = torch.optim.AdamW(
            groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
        )

    def step(self, learning_rate: float, loss: torch.Tensor | None = None) -> torch.Tensor:
        """Clips, updates the masters, publishes them to the model and clears the gradient. Returns the gradient's norm
        before clipping, as torch's `clip_grad_norm_` does, still on the device. A norm or a loss that is not finite
        updates nothing, which the device finds out by itself: nothing here waits for it."""
        gradients = self._masters.gradients
        norm: torch.Tensor = torch.linalg.vector_norm(gradients)
        finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
        if self._max_norm > 0:
            gradients.mul_(torch.clamp(self._max_norm / (norm + 1e-6), max=1.0))
        for group, (_, _, factor) in zip(self._adam.param_groups, self._parts, strict=True):
            group["lr"] = learning_rate * factor
        # The switch that torch's gradient scaler uses: at 1 the fused kernel leaves weights, moments and step alone.
        self._adam.found_inf = finite.logical_not().to(torch.float32)  # type: ignore[attr-defined]
        self._adam.step()
        self._masters.publish()
        self._masters.zero_gradients()
        return norm

    def is_finite(self) -> torch.Tensor:
        """Whether every weight and both moments are finite, still on the device; one pass over each, and no copy."""
        flats = [self._masters.values]
        for group in self._adam.param_groups:
            flats += [state for name, state in self._adam.state[group["params"][0]].items() if name in _MOMENTS]
        edges = torch.stack([edge for flat in flats for edge in torch.aminmax(flat)])  # a NaN is both edges
        return torch.isfinite(edges).all()

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by weight and the count of updates; empty before the first step."""
        result: dict[str, torch.Tensor] = {}
        states = [self._adam.state[group["params"][0]] for group in self._adam.param_groups]
        if not all(states):
            return result
        for moment in _MOMENTS:
            flat = torch.cat([state[moment] for state in states])
            result |= {f"{moment}.{name}": each.clone() for name, each in self._masters.named(flat)}
        result["step"] = states[0]["step"].detach().clone().cpu()
        return result

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes up a `state()`; an empty one is that before the first step. Raises KeyError when a trained weight is
        missing in it."""
        self._adam.state.clear()
        if not state:
            return
        moments = {moment: torch.empty_like(self._masters.values) for moment in _MOMENTS}
        for moment, flat in moments.items():
            for name, each in self._masters.named(flat):
                each.copy_(state[f"{moment}.{name}"])
        for group, (part, _, _) in zip(self._adam.param_groups, self._parts, strict=True):
            values = group["params"][0]
            step = state["step"].to(device=values.device if values.is_cuda else "cpu", dtype=torch.float32).clone()
            self._adam.state[values] = {
                "step": step,
                **{moment: flat[part].clone() for moment, flat in moments.items()},
            }
