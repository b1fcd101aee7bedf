"""Swin-UMamba in 3D: the plan's strides and a 3D scan.

Ours, after Liu et al. 2024 (Swin-UMamba), whose network is 2D. What differs: every stride, also
that of patch merging, is the plan's and may be anisotropic; SS2D becomes a scan of a 3D map with
a 3D depthwise convolution, bidirectional unless the option ``order`` says otherwise. ImageNet
weights of the 2D encoder are turned into 3D ones by ``pretrained.py``.
"""

from dataclasses import replace

from torch import nn

from medmamba.networks.definition import NetworkDefinition
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.swin_umamba import DEPTHS, FEWEST_STAGES, WIDTHS
from medmamba.networks.swin_umamba import build as build_any

DEFAULT_ORDER = "bidirectional"
"""A controlled 3D study found that simple scans mostly suffice (arXiv 2503.19308)."""

FURTHER_DEPTH = 2
"""VSS blocks of stages deeper than VMamba-T's fourth."""


def build(spec: NetworkSpec) -> nn.Module:
    """Build Swin-UMamba for a 3D plan.

    Raises:
        PlanError: a topology or an option it cannot be built from.
    """
    return build_any(with_order(spec))


def with_order(spec: NetworkSpec) -> NetworkSpec:
    """Fill in the scan order where the options name none."""
    return replace(spec, options={"order": DEFAULT_ORDER, **spec.options})


def arrange(spec: NetworkSpec) -> NetworkSpec:
    """Strides and kernels of the plan; VMamba-T's widths and depths, as many as it has stages.

    The planner also asks about topologies too shallow to build, on its way to smaller patches.
    """
    encoder = max(1, spec.stages - 2)
    widths = [min(WIDTHS[1] * 2**stage, WIDTHS[-1]) for stage in range(encoder)]
    depths = (DEPTHS + (FURTHER_DEPTH,) * encoder)[:encoder]
    return replace(
        with_order(spec),
        features=(WIDTHS[0], *widths, widths[-1])[: spec.stages],
        encoder_blocks=(1, 1, *depths)[: spec.stages],
        decoder_blocks=(1,) * (spec.stages - 1),
    )


SWIN_UMAMBA_3D = NetworkDefinition(
    build=build,
    dimensions=frozenset({3}),
    arrange=arrange,
    fewest_stages=FEWEST_STAGES,
    source="ours, after Liu et al. 2024, Swin-UMamba (arXiv 2402.03302)",
    summary="Swin-UMamba with 3D scans and the plan's strides",
)
