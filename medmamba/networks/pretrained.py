"""ImageNet start: fill a Swin-UMamba's encoder from VMamba-T weights, and say what was filled.

The file's tensors come as a plain dict (reading foreign files is ``interop``'s). In 2D tensors
fit as they are; in 3D they are inflated so that a volume of equal slices is answered, away from
its ends, as the 2D layer answers the slice.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from medmamba.errors import BundleError
from medmamba.networks.ssm import DirectionalScan
from medmamba.networks.swin_umamba import DEPTHS
from medmamba.networks.vss import PatchMerging, VSSEncoder

Mode = Literal["exact", "corrected"]
"""``exact`` loads what the official loader loads; ``corrected`` leaves out the norm bias that it
loads, through a typo, without the norm's weight."""

KNOWN = (
    "Only the first public VMamba-T (vssmtiny_dp01_ckpt_epoch_292.pth) and files that hold the "
    "same tensors fit."
)
CLASSIFIER = ("norm.", "head.")
SCAN = ".self_attention."
PLACE = re.compile(r"^(layers|downsamples)\.(\d+)\.(?:blocks\.(\d+)\.)?")
NAMES_SHOWN = 3
STACKED = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias")
FLATTENED = ("A_logs", "Ds")
"""Tensors of a scan with one part per direction: in an axis of their own, or one after another."""

RENAMED = (
    (re.compile(r"^patch_embed\.0\."), "patch_embed.proj."),
    (re.compile(r"^patch_embed\.2\."), "patch_embed.norm."),
    (re.compile(r"(blocks\.\d+)\.norm\."), r"\1.ln_1."),
    (re.compile(r"(blocks\.\d+)\.op\."), r"\1.self_attention."),
    (re.compile(r"^classifier\.(norm|head)\."), r"\1."),
    (re.compile(r"^layers\.(\d+)\.downsample\."), r"downsamples.\1."),
)
"""Names of VMamba's later code and of its merging layers, as the encoder here calls them."""

IMAGENET_CHANNELS = 3
ROW, COLUMN, ROW_BACK, COLUMN_BACK = range(4)
"""Directions in the stacked tensors of SS2D."""

SOURCES: Mapping[tuple[str, int], tuple[int, ...]] = {
    ("cross", 2): (ROW, COLUMN, ROW_BACK, COLUMN_BACK),
    ("cross", 3): (ROW, COLUMN, COLUMN, ROW_BACK, COLUMN_BACK, COLUMN_BACK),
    ("tri", 2): (ROW, ROW_BACK, COLUMN),
    ("tri", 3): (ROW, ROW_BACK, COLUMN),
    ("bidirectional", 2): (ROW, ROW_BACK),
    ("bidirectional", 3): (ROW, ROW_BACK),
    ("reverse", 2): (ROW_BACK,),
    ("reverse", 3): (ROW_BACK,),
}
"""The 2D direction that each direction of a scan order starts from; rows where not listed."""


@dataclass(frozen=True, kw_only=True)
class PretrainedReport:
    """What became of every tensor of a file, and what was left at its own initialisation.

    Args:
        mode: the mode that was asked for.
        loaded: names of tensors that were taken as they are.
        inflated: names of tensors that were given a third axis or other directions.
        skipped: names of tensors that were not used, with the reason.
        fresh: names of the encoder's tensors that no tensor of the file filled.
    """

    mode: Mode
    loaded: tuple[str, ...]
    inflated: tuple[str, ...]
    skipped: Mapping[str, str]
    fresh: tuple[str, ...]

    @property
    def skipped_by_reason(self) -> dict[str, list[str]]:
        """Names of skipped tensors, grouped by why."""
        grouped: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            grouped.setdefault(reason, []).append(name)
        return grouped

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"{len(self.loaded)} tensors loaded, {len(self.inflated)} inflated, "
            f"{len(self.skipped)} skipped ({self.mode}); "
            f"{len(self.fresh)} of the encoder start fresh"
        )


def start_from_vmamba(
    network: nn.Module, state: Mapping[str, Tensor], *, mode: Mode = "exact"
) -> PretrainedReport:
    """Fill the encoder of a Swin-UMamba from the state dict of a VMamba-T, first public version.

    Args:
        network: ``swin_umamba``, ``swin_umamba_d`` or ``swin_umamba_3d``.
        state: tensors by name, under the names of VMamba's first or of its later code.
        mode: ``exact`` or ``corrected``.

    Raises:
        BundleError: a network without that encoder, or tensors that are unknown, misshapen or
            missing; nothing has been changed then.
    """
    encoder = require_encoder(network)
    own = encoder.state_dict()
    filled: dict[str, Tensor] = {}
    loaded: list[str] = []
    inflated: list[str] = []
    skipped: dict[str, str] = {}
    for original, weight in state.items():
        name = own_name(original, encoder.dimension)
        reason = skip_reason(network, encoder, name, mode)
        if reason is not None:
            skipped[original] = reason
            continue
        if name not in own:
            raise BundleError(f"pretrained weights: tensor {original!r} is unknown. {KNOWN}")
        filled[name] = fit(encoder, name, weight)
        (loaded if filled[name] is weight else inflated).append(original)
    require_all(encoder, filled)
    encoder.load_state_dict(filled, strict=False)
    report = PretrainedReport(
        mode=mode,
        loaded=tuple(loaded),
        inflated=tuple(inflated),
        skipped=skipped,
        fresh=tuple(name for name in own if name not in filled),
    )
    logging.getLogger(__name__).info("pretrained weights: %s", report.summary)
    return report


def frozen_parameters(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that stay fixed while the decoder learns to use them.

    They are the encoder's, without the patch embedding, which sees other images than ImageNet's.

    Raises:
        BundleError: a network without a VMamba encoder.
    """
    encoder = require_encoder(network)
    return tuple(
        f"vssm_encoder.{name}"
        for name, _ in encoder.named_parameters()
        if not name.startswith("patch_embed.")
    )


def require_encoder(network: nn.Module) -> VSSEncoder:
    """Return the VMamba encoder of a network.

    Raises:
        BundleError: it has none.
    """
    encoder = getattr(network, "vssm_encoder", None)
    if isinstance(encoder, VSSEncoder):
        return encoder
    raise BundleError(
        f"pretrained weights: a {type(network).__name__} has no VMamba encoder. "
        "Use them with swin_umamba, swin_umamba_d or swin_umamba_3d."
    )


def own_name(name: str, dimension: int) -> str:
    """Return what the encoder here calls a tensor of VMamba's file."""
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name.replace(".conv2d.", f".conv{dimension}d.")


def skip_reason(network: nn.Module, encoder: VSSEncoder, name: str, mode: Mode) -> str | None:
    """Return why a tensor is not used, or None when it is."""
    if name.startswith(CLASSIFIER):
        return "belongs to the classifier"
    if name.startswith("patch_embed."):
        return _patch_embed_reason(network, encoder, name, mode)
    place = PLACE.match(name)
    if place is None:
        return None
    kind, index, block = place[1], int(place[2]), int(place[3] or 0)
    parts = getattr(encoder, kind)
    if index >= len(parts):
        return f"the network has {len(parts)} {kind}"
    if kind == "layers" and block >= len(parts[index].blocks):
        return f"stage {index} of the network has {len(parts[index].blocks)} blocks"
    if SCAN in name and not isinstance(scan_of(encoder, name), DirectionalScan):
        return "a twin stands in place of the scan"
    return None


def _patch_embed_reason(
    network: nn.Module, encoder: VSSEncoder, name: str, mode: Mode
) -> str | None:
    if hasattr(network, "stem"):
        if name == "patch_embed.norm.bias" and mode == "exact":
            return None
        return "the patch embedding follows a stem here"
    channels = encoder.patch_embed.proj.in_channels
    if channels == IMAGENET_CHANNELS:
        return None
    return f"the image has {channels} channels, ImageNet's have {IMAGENET_CHANNELS}"


def scan_of(encoder: VSSEncoder, name: str) -> nn.Module:
    """Return the module that mixes tokens in the block a tensor belongs to."""
    return encoder.get_submodule(name[: name.index(SCAN) + len(SCAN) - 1])


def fit(encoder: VSSEncoder, name: str, weight: Tensor) -> Tensor:
    """Return the tensor that starts ``name``: ``weight`` itself, or an inflated form of it.

    Raises:
        BundleError: its shape does not belong there.
    """
    target, made = encoder.state_dict()[name], weight
    part = name.rsplit(".", 1)[-1]
    try:
        if part in STACKED or part in FLATTENED:
            made = pick_directions(scan_of(encoder, name), weight, flattened=part in FLATTENED)
        elif weight.dim() == 4 and target.dim() == 5:
            depth = target.shape[2]
            made = (weight / depth).unsqueeze(2).expand(-1, -1, depth, -1, -1)
        elif name.startswith("downsamples.") and encoder.dimension == 3:
            merging = encoder.downsamples[int(name.split(".")[1])]
            made = inflate_merging(merging, weight, divide=part == "weight" and weight.dim() == 2)
    except RuntimeError as error:
        raise _misfit(name, weight, target) from error
    if made.shape != target.shape:
        raise _misfit(name, weight, target)
    return made


def _misfit(name: str, weight: Tensor, target: Tensor) -> BundleError:
    return BundleError(
        f"pretrained weights: tensor {name} has shape {list(weight.shape)}, which does not fit "
        f"{list(target.shape)}. {KNOWN}"
    )


def pick_directions(scan: nn.Module, weight: Tensor, *, flattened: bool) -> Tensor:
    """Stack the 2D directions that the directions of ``scan`` start from."""
    assert isinstance(scan, DirectionalScan)
    count = len(scan.x_proj_weight)
    sources = SOURCES.get((scan.order, scan.dimension), (ROW,) * count)
    if sources == SOURCES["cross", 2]:
        return weight
    stacked = weight.reshape(len(SOURCES["cross", 2]), -1, *weight.shape[1:])
    picked = stacked[list(sources)]
    return picked.flatten(0, 1) if flattened else picked.squeeze(1)


def inflate_merging(merging: nn.Module, weight: Tensor, *, divide: bool) -> Tensor:
    """Repeat what merging does to 2x2 neighbours for every slice that is merged.

    Where the plan does not merge along an axis of the slice, its two neighbours are one voxel
    here: the linear's columns are added, the norm's values averaged.

    Args:
        merging: the layer to fill, for its strides.
        weight: (..., 4·C), neighbours ordered with rows fastest, then columns.
        divide: for the linear, whose inputs are repeated; the norm acts on each of them.
    """
    assert isinstance(merging, PatchMerging)
    depth, *plane = merging.stride
    if merging.stride == (1, 2, 2):
        return weight
    parts = weight.reshape(*weight.shape[:-1], 2, 2, -1)
    for axis, step in ((-2, plane[0]), (-3, plane[1])):
        if step == 1:
            total = parts.sum(axis, keepdim=True)
            parts = total if divide else total / 2
    repeated = parts.unsqueeze(-2).expand(*parts.shape[:-1], depth, parts.shape[-1])
    return (repeated / depth if divide else repeated).flatten(-4)


def require_all(encoder: VSSEncoder, filled: Mapping[str, Tensor]) -> None:
    """Refuse a file that lacks tensors which a VMamba-T has and the encoder has a place for.

    Raises:
        BundleError: naming the first of them.
    """
    missing = [
        name
        for name in encoder.state_dict()
        if name not in filled and is_in_vmamba_t(encoder, name)
    ]
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN])
        raise BundleError(
            f"pretrained weights: {len(missing)} tensors are missing, first {shown}. {KNOWN}"
        )


def is_in_vmamba_t(encoder: VSSEncoder, name: str) -> bool:
    """Whether a VMamba-T has a tensor for this place of the encoder."""
    place = PLACE.match(name)
    if place is None:
        return False
    index = int(place[2])
    if SCAN in name:
        scan = scan_of(encoder, name)
        if not isinstance(scan, DirectionalScan) or ".attention." in name:
            return False
    if place[1] == "downsamples":
        return index < len(DEPTHS) - 1
    return index < len(DEPTHS) and int(place[3] or 0) < DEPTHS[index]
