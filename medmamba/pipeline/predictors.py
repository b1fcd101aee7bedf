"""From a model folder to networks on a device that segment cases, in a precision that holds."""

from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.acceptance import synthetic_image
from medmamba.bundle import (
    Bundle,
    load_bundle,
    load_expected,
    load_networks,
    load_previous_networks,
)
from medmamba.errors import EnvironmentFault
from medmamba.plans.plan import ConfigurationPlan
from medmamba.preprocessing.memory_gate import available_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from medmamba.inference.ensemble import EnsemblePredictor
    from medmamba.inference.predictor import Predictor
    from medmamba.inference.records import Parity
    from medmamba.preprocessing.probability_file import ProbabilityKind

LEAST_FEATURE_MAPS = 2
"""That are there at once in any network: what a convolution reads and what it writes."""


def make_predictor(
    bundle: Bundle,
    *,
    mirror: bool = False,
    step: float = 0.5,
    precision: str = "auto",
    device: str = "auto",
    compat: bool = False,
    workers: int | None = None,
    reuse_constant: bool = True,
    cpu_fallback: bool = False,
    probabilities: "ProbabilityKind" = "none",
) -> "EnsemblePredictor":
    """Load the networks of a bundle onto a device, all members; arguments as of ``predict``.

    ``reuse_constant`` computes tiles of one single value once; ``cpu_fallback`` lets a case that
    the device has no memory for be computed on the CPU.
    """
    from medmamba.inference.ensemble import EnsemblePredictor

    members = [
        _member(
            model, mirror=mirror, step=step, precision=precision, device=device, compat=compat,
            workers=workers, reuse_constant=reuse_constant, cpu_fallback=cpu_fallback,
        )
        for model in bundle.models
    ]  # fmt: skip
    cleaning = bundle.postprocessing
    return EnsemblePredictor(
        members,
        None if cleaning is None else cleaning.apply,
        # Members of an ensemble were trained on the same cases.
        bundle.models[0].manifest.usual_volumes,
        probabilities,
    )


def _member(
    bundle: Bundle,
    *,
    mirror: bool,
    step: float,
    precision: str,
    device: str,
    compat: bool,
    workers: int | None,
    reuse_constant: bool,
    cpu_fallback: bool,
) -> "Predictor":
    import torch

    from medmamba.training.precision import choose_precision, has_native_bf16, resolve_device

    chosen_device = resolve_device(device)
    if not cpu_fallback:
        for branch in filter(None, (bundle.previous, bundle.configuration)):
            _require_room(branch, chosen_device, bundle.manifest.name)
    if workers is not None:
        torch.set_num_threads(workers)
    trained, was_free = bundle.manifest.precision, precision == "auto"
    if precision == "auto" and (trained == "fp32" or not has_native_bf16(chosen_device)):
        # Reduced precision only where the model was trained and validated in it.
        precision = "fp32"
    chosen = choose_precision(chosen_device, precision)
    stages = _Stages(
        bundle,
        device=chosen_device,
        step=step,
        compat=compat,
        reuse_constant=reuse_constant,
        cpu_fallback=cpu_fallback,
    )
    if chosen == "fp32":
        return stages.predictor("fp32", mirror=mirror)
    parity = stages.parity(chosen, mirror=mirror)
    if not parity.passed:
        # Who leaves the choice to us gets what was asked for: the fastest that holds. What was
        # chosen is said by `describe_settings`, once.
        fallbacks = () if was_free else (f"fp32 instead of {chosen}, which {parity}",)
        return stages.predictor("fp32", mirror=mirror, parity=parity, fallbacks=fallbacks)
    return stages.predictor(chosen, mirror=mirror, parity=parity)


def _require_room(branch: ConfigurationPlan, device: "torch.device", model: str) -> None:
    """Refuse a plan whose patch cannot be computed here, before anything is loaded.

    Raises:
        EnvironmentFault: two feature maps of the first stage alone take more than there is.
    """
    import torch

    patch = branch.grid.patch_size
    stage = branch.network
    voxels = prod(ceil(size / stride) for size, stride in zip(patch, stage.strides[0], strict=True))
    needed = voxels * stage.features[0] * LEAST_FEATURE_MAPS * torch.float32.itemsize
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else available_bytes()
    if needed > there:
        raise EnvironmentFault(
            f"model {model}: one patch of {'x'.join(map(str, patch))} voxels takes at least "
            f"{needed / 2**30:.1f} GiB, {device} has {there / 2**30:.1f} GiB. Use a machine with "
            "more memory, or a model planned for less (plan --gpu-memory).",
            code="E_MEM_GPU" if on_gpu else "E_MEM_HOST",
        )


class _Stages:
    """The networks of a bundle, loaded once, as predictors of one precision or another.

    Args:
        bundle: the model.
        how: device and whatever else of `PredictionSettings` does not depend on the stage.
    """

    def __init__(self, bundle: Bundle, **how: Any) -> None:
        self._bundle = bundle
        self._networks = load_networks(bundle)
        self._previous = None if bundle.previous is None else load_previous_networks(bundle)
        self._how = how

    def predictor(
        self,
        precision: str,
        *,
        mirror: bool,
        parity: "Parity | None" = None,
        fallbacks: tuple[str, ...] = (),
    ) -> "Predictor":
        """Put the networks to work; the predictors share them."""
        from medmamba.inference.predictor import PredictionSettings, Predictor

        def stage(
            networks: "list[nn.Module]", branch: ConfigurationPlan, **others: Any
        ) -> Predictor:
            settings = PredictionSettings(
                precision=precision,
                mirror_axes=branch.training.mirror_axes if mirror else (),
                features=branch.network.features[0],
                patch_multiple=branch.network.total_stride,
                **self._how,
            )
            return Predictor(
                networks,
                grid=branch.grid,
                preprocessing=branch.preprocessing,
                label_map=self._bundle.plan.label_map,
                settings=settings,
                **others,
            )

        first = None
        if self._bundle.previous is not None and self._previous is not None:
            first = stage(self._previous, self._bundle.previous)
        return stage(
            self._networks,
            self._bundle.configuration,
            previous=first,
            parity=parity,
            fallbacks=fallbacks,
        )

    def parity(self, precision: str, *, mirror: bool) -> "Parity":
        """Compare reduced precision with float32 on the synthetic image of the acceptance test.

        What float32 says travels with the model, hashed like its weights, or is computed here.

        With the flips that will be averaged, which cancel errors where a model takes all of them
        alike, and make it waver where it does not.
        """
        from medmamba.inference.parity import compare_precisions, compare_with

        branch = self._bundle.configuration
        image = synthetic_image(branch, self._bundle.plan.intensities)
        reduced = self.predictor(precision, mirror=mirror)
        axes = branch.training.mirror_axes if mirror else ()
        expected = None
        if not self._how.get("compat"):  # which rounds as nothing stored does
            expected = load_expected(self._bundle, mirror_axes=axes)
        if expected is not None:
            return compare_with(expected, reduced, image)
        return compare_precisions(self.predictor("fp32", mirror=mirror), reduced, image)


def check_parity(
    model: Path, precision: str, device: str = "auto", *, mirror: bool = False
) -> "tuple[Parity, ...]":
    """Compare reduced precision with float32 for every network of a model.

    Raises:
        BundleError, SecurityError: the model cannot be used or trusted.
    """
    from medmamba.training.precision import choose_precision, resolve_device

    place = resolve_device(device)
    chosen = choose_precision(place, precision)
    bundle = load_bundle(model)
    return tuple(
        _Stages(each, device=place).parity(chosen, mirror=mirror) for each in bundle.models
    )


def describe_settings(predictor: "EnsemblePredictor") -> str:
    """Say where and how a predictor computes. A warning has told why a gate failed."""
    settings = predictor.settings
    flips = "with mirroring" if settings.mirror_axes else "without mirroring"
    texts = [f"on {settings.device} in {settings.precision}, {flips}"]
    texts += [
        f"parity gate of {each.precision} {each if each.passed else 'failed'}"
        for each in predictor.parities
    ]
    return "; ".join(texts)
