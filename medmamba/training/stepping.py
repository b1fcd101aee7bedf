"""One step of a network: forward, loss, backward, clipping, update; and forward alone.

Knows precision, gradient scaling and memory format; knows nothing of epochs, files or data.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medmamba.labels import LabelMap
from medmamba.networks.memory_format import pack_weights
from medmamba.training.losses import (
    DeepSupervision,
    LossSettings,
    build_loss,
    itself,
    region_targets,
)
from medmamba.training.optimization import WeightAverage, clip_gradients, make_optimizer
from medmamba.training.precision import autocast
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.sample_threads import SampleThreads, suits
from medmamba.training.sampling import Batch
from medmamba.training.step_graph import StepGraph, can_record
from medmamba.training.team import ALONE, Team


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """Loss and gradient norm of a step; ``applied`` is false when they were not finite."""

    loss: float
    gradient_norm: float
    applied: bool


class Stepper:
    """A network with its loss and optimiser.

    Args:
        network: on its device already.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        batch_size: samples this process computes of a batch, which decides how a CPU shares the
            work.
        team: the processes that share every batch.
        graph: on a GPU, replay steps from a CUDA graph where they fit.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: TrainingRecipe,
        label_map: LabelMap,
        *,
        device: torch.device,
        precision: str,
        batch_size: int = 1,
        team: Team = ALONE,
        graph: bool = False,
    ) -> None:
        if hasattr(network, "deep_supervision"):
            network.deep_supervision = recipe.deep_supervision  # type: ignore[assignment]
        settings = LossSettings.of(
            label_map,
            batch_dice=recipe.batch_dice,
            options=recipe.loss_options,
            total=itself if team.size == 1 else team.total,
        )
        if device.type == "cpu":
            pack_weights(network)
        self.network = network
        self.optimizer = make_optimizer(network, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.average = (
            WeightAverage(network, recipe.weight_averaging) if recipe.weight_averaging else None
        )
        self._loss = DeepSupervision(build_loss(recipe.loss, settings))
        self._label_map = label_map
        self._clip = recipe.gradient_clip
        self._device = device
        self._precision = precision
        self._team = team
        self._samples = (
            SampleThreads(network, precision=precision)
            if suits(network, device, batch_size)
            else None
        )
        recordable = graph and can_record(device, team.size)
        self._graph = StepGraph(network, self._differentiate) if recordable else None

    @property
    def replays(self) -> bool:
        """Whether the last training step came from a CUDA graph."""
        return self._graph is not None and self._graph.recorded

    def train(self, batch: Batch, learning_rate: float, iteration: int) -> StepOutcome:
        """Update the weights by one batch, unless its loss or gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._gradients(batch)
        self._team.sum_gradients(list(self.network.parameters()))
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.network.parameters(), self._clip)
        loss_value, norm_value = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
        applied = math.isfinite(loss_value) and math.isfinite(norm_value)
        if applied:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            # Lowers its scale after an overflow. It is not asked to step then: a fused optimiser
            # would leave out the update and yet take momentum for begun, from unset memory.
            self.scaler.update()
        if applied and self.average is not None:
            self.average.update(self.network, iteration)
        return StepOutcome(loss=loss_value, gradient_norm=norm_value, applied=applied)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss and full-resolution logits of a batch, with the network as it is."""
        loss, outputs = self._forward(self._data(batch), self._target(batch))
        return loss, outputs[0].float()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the network the averaged weights for a while, where there are any."""
        if self.average is None:
            yield
            return
        own = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.tensors)
        yield
        self.network.load_state_dict(own)

    def has_finite_weights(self) -> bool:
        """Tell whether all weights are finite."""
        return all(bool(p.isfinite().all()) for p in self.network.parameters())

    def bad_parameters(self) -> list[str]:
        """Name the parameters whose values or gradients are not finite."""
        return [
            name
            for name, p in self.network.named_parameters()
            if not p.isfinite().all() or (p.grad is not None and not p.grad.isfinite().all())
        ]

    def _gradients(self, batch: Batch) -> Tensor:
        """Give every parameter its gradient, as a fresh start; return the loss."""
        if self._graph is not None:
            return self._graph.gradients(self._data(batch), self._target(batch))
        self.optimizer.zero_grad(set_to_none=True)
        if self._samples is None:
            return self._differentiate(self._data(batch), self._target(batch))
        target = self._target(batch)
        return self._samples.gradients(batch.data, lambda outputs: self._loss(outputs, target))

    def _differentiate(self, data: Tensor, target: Tensor) -> Tensor:
        loss, _ = self._forward(data, target)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss

    def _forward(self, data: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        with autocast(self._device, self._precision):
            outputs = self.network(data)
        if isinstance(outputs, Tensor):
            outputs = [outputs]
        return self._loss(outputs, target), outputs

    def _data(self, batch: Batch) -> Tensor:
        return batch.data.to(self._device, non_blocking=True)

    def _target(self, batch: Batch) -> Tensor:
        labels = batch.labels.to(self._device, non_blocking=True)
        return region_targets(labels, self._label_map) if self._label_map.has_regions else labels
