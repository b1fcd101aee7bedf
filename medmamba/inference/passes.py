"""Forward passes over tiles: every flip of every network, and the mean of what they say.

Shapes: C image channels, K network outputs, P flips, T tiles, (...) the patch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medmamba.inference.votes import Votes


def mean_logits(
    networks: Sequence[nn.Module],
    tiles: Tensor,
    *,
    flips: tuple[tuple[int, ...], ...],
    batch: int,
    half: bool,
    votes: Votes | None,
) -> list[list[Tensor]]:
    """Per tile the logits to add up: of each network in compat mode, else their mean."""
    ballots: list[Tensor] = []
    listen = None if votes is None else lambda output: ballots.append(votes.ballot(output))
    logits = [
        _mirrored(network, tiles, flips, batch=batch, half=half, listen=listen)
        for network in networks
    ]
    total = logits[0].clone() if half and len(logits) > 1 else logits[0]
    for other in logits[1:]:
        total = total.add_(other)
    if len(logits) > 1:
        total = total.div_(len(logits))
    if votes is not None:
        votes.count(ballots, total)
    if half:
        return [list(parts) for parts in zip(*logits, strict=True)]
    return [[tile] for tile in total]


def _mirrored(
    network: nn.Module,
    tiles: Tensor,
    flips: tuple[tuple[int, ...], ...],
    *,
    batch: int,
    half: bool,
    listen: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Mean logits over flips, (T, K, *patch); several flips share a pass where ``batch`` allows.

    They are summed in float32, or with ``half`` in whatever autocast gives, as nnU-Net does.
    """
    count = tiles.shape[0]
    flips_per_pass = max(1, batch // count)
    total: Tensor | None = None
    for first in range(0, len(flips), flips_per_pass):
        chosen = [_spatial(axes) for axes in flips[first : first + flips_per_pass]]
        inputs = torch.cat([tiles.flip(axes) if axes else tiles for axes in chosen])
        outputs = _highest_resolution(network(inputs))
        parts = torch.split(outputs if half else outputs.float(), count)
        for axes, output in zip(chosen, parts, strict=True):
            straight = output.flip(axes) if axes else output
            if listen is not None:
                listen(straight)
            total = straight if total is None else total.add_(straight)
    assert total is not None
    return total.div_(len(flips)) if len(flips) > 1 else total


def _highest_resolution(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _spatial(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a patch as axes of a batch of inputs (T, C, *patch)."""
    return tuple(axis + 2 for axis in axes)
