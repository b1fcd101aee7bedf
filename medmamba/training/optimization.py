"""Optimiser, gradient clipping, and the mean of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medmamba.training.recipe import TrainingRecipe

SSM_PARAMETERS = ("A_log", "A_logs", "D", "Ds", "dt_proj.bias", "dt_projs_bias")
"""Parameters of the scan that decay pulls towards another dynamics (Mamba leaves them out)."""

ADAM_BETAS = (0.9, 0.999)


def make_optimizer(network: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser over all parameters that are trained."""
    groups = parameter_groups(network, recipe)
    rate = recipe.learning_rate
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=True, fused=True)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=ADAM_BETAS, eps=recipe.adam_eps, fused=True)
    return torch.optim.AdamW(groups, lr=rate, betas=ADAM_BETAS, eps=recipe.adam_eps, fused=True)


def parameter_groups(network: nn.Module, recipe: TrainingRecipe) -> list[dict[str, object]]:
    """Split parameters into decayed ones and, unless ``decay_ssm``, those of the scan."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    free = [] if recipe.decay_ssm else [p for name, p in named if is_ssm_parameter(name)]
    excluded = {id(p) for p in free}
    groups: list[dict[str, object]] = [
        {
            "params": [p for _, p in named if id(p) not in excluded],
            "weight_decay": recipe.weight_decay,
        }
    ]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return groups


def is_ssm_parameter(name: str) -> bool:
    """Tell A_log, D and the bias of the time step from other parameters, by their names."""
    return any(name == tail or name.endswith(f".{tail}") for tail in SSM_PARAMETERS)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients down to an L2 norm of ``limit``; return the norm before.

    Unlike torch's own clipping it leaves gradients alone when they are below the limit, which
    saves a pass over memory per step on a CPU.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type == "cpu" and not norm > limit:
        return norm
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class WeightAverage:
    """An exponential mean of the weights, started at their first values.

    The decay grows from 0 to its value, so that short runs do not remember their first steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: tensor.detach().clone() for name, tensor in network.state_dict().items()
        }

    def update(self, network: nn.Module, steps: int) -> None:
        """Move the mean towards the weights after ``steps`` steps of training."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for name, tensor in network.state_dict().items():
            mean = self.tensors[name]
            if mean.is_floating_point():
                mean.lerp_(tensor.detach(), 1 - decay)
            else:
                mean.copy_(tensor)
