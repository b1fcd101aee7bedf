"""Memory of a training step, found by running it on tensors that have sizes and no values.

Forward, loss and backward run as they do in training, on fake tensors, and every storage is
followed from its birth to its death: the most that live at one time is the peak. What a GPU does
other than a CPU is imitated: the forms of layers that run there, its autocast, and the buffers of
its scan. Workspaces of its libraries are not. Measured peaks: kernels/README.md.
"""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from medmamba.files import to_json
from medmamba.kernels.operator import backward_buffers
from medmamba.kernels.placement import as_on_gpu
from medmamba.labels import LabelMap
from medmamba.networks.gpu_autocast import autocast_as_on_gpu
from medmamba.networks.memory import fake_network
from medmamba.networks.spec import NetworkSpec
from medmamba.training.losses import DeepSupervision, LossSettings, build_loss, region_targets
from medmamba.training.recipe import TrainingRecipe

BLOCK = 512
"""PyTorch's CUDA allocator hands out memory in multiples of this."""

OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Values each optimiser keeps per parameter."""


@dataclass(frozen=True, kw_only=True)
class StepConditions:
    """What a training step depends on besides the network and the size of its batch.

    Args:
        recipe: its loss, deep supervision, optimiser and weight averaging; not its batch size.
        label_map: classes or regions, and whether there is an ignore label.
        on_gpu: count what runs on a GPU, under bfloat16 autocast; else on a CPU, in float32.
    """

    recipe: TrainingRecipe
    label_map: LabelMap
    on_gpu: bool = True


def step_memory(spec: NetworkSpec, batch_size: int, conditions: StepConditions) -> int:
    """Return the most bytes that a training step holds at one time, weights and all.

    Args:
        spec: the network and its patch.
        batch_size: patches per step.
        conditions: what else decides.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    return _step_memory(_Step(spec, batch_size, conditions))


class _Step:
    """The arguments as a key; options are mappings and so have no hash."""

    def __init__(self, spec: NetworkSpec, batch_size: int, conditions: StepConditions) -> None:
        self.spec, self.batch_size, self.conditions = spec, batch_size, conditions
        self.text = to_json([spec, batch_size, conditions])

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Step) and self.text == other.text


@lru_cache(maxsize=256)
def _step_memory(step: _Step) -> int:
    spec, conditions = step.spec, step.conditions
    lives = _Lives()
    with ExitStack() as stack:
        if conditions.on_gpu:
            stack.enter_context(as_on_gpu())
        network, image = stack.enter_context(fake_network(spec, step.batch_size))
        stack.enter_context(lives)
        for tensor in (*network.parameters(), *network.buffers(), image):
            lives.add(tensor)
        labels = torch.empty(step.batch_size, 1, *spec.patch_size, dtype=torch.int16)
        _differentiate(network, image, labels, conditions)
        kept = sum(parameter.nbytes for parameter in network.parameters())
        copies = OPTIMIZER_STATES[conditions.recipe.optimizer]
        copies += conditions.recipe.weight_averaging > 0
    # The optimiser's values live from the first step on.
    return lives.peak + copies * kept


def _differentiate(
    network: nn.Module, image: Tensor, labels: Tensor, conditions: StepConditions
) -> None:
    recipe, label_map = conditions.recipe, conditions.label_map
    network.deep_supervision = recipe.deep_supervision  # type: ignore[assignment]
    settings = LossSettings.of(label_map, batch_dice=recipe.batch_dice, options=recipe.loss_options)
    loss = DeepSupervision(build_loss(recipe.loss, settings))
    target = region_targets(labels, label_map) if label_map.has_regions else labels
    with _autocast(conditions.on_gpu):
        outputs = network(image)
    loss([outputs] if isinstance(outputs, Tensor) else outputs, target).backward()


def _autocast(on_gpu: bool) -> AbstractContextManager[object]:
    return autocast_as_on_gpu(torch.bfloat16) if on_gpu else torch.autocast("cpu", enabled=False)


class _Lives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on until nothing holds it."""
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(id(storage))
        self._live += size
        weakref.finalize(storage, self._remove, id(storage), size)

    def _remove(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self._live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self.add(value)
        passing = backward_buffers(args) if func is _SCAN_BACKWARD else 0
        self.peak = max(self.peak, self._live + passing)
        return found


_SCAN_BACKWARD = torch.ops.medmamba.selective_scan_bwd.default
