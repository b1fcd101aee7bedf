"""What a run begins with instead of fresh weights: ImageNet's, or those of a trained model."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.errors import BundleError, UsageError
from medmamba.files import hash_file, to_plain
from medmamba.training.start import Start

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medmamba.interop.donor import Donor
    from medmamba.networks.spec import NetworkSpec
    from medmamba.plans.plan import Plan

MODES = ("exact", "corrected")

NAMES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a user asked a run to begin with; fresh weights where nothing is given.

    Args:
        pretrained: file of VMamba-T weights for the encoder of a Swin-UMamba.
        pretrained_mode: ``exact`` or ``corrected``.
        init: a trained model, ours or foreign.
        init_form: train the network in that model's form, not the plan's.
        freeze_epochs: epochs for which what was given stays fixed.
    """

    pretrained: Path | None = None
    pretrained_mode: str = "exact"
    init: Path | None = None
    init_form: bool = False
    freeze_epochs: int | None = None

    def start(
        self, decided: "Plan", name: str, fold: int | str, say: Callable[[str], None] | None
    ) -> "tuple[NetworkSpec, Start | None]":
        """Return the network to train and what to fill it with.

        Raises:
            UsageError: options that exclude each other or lack their partner.
            SecurityError, BundleError, PlanError: the given weights cannot be used.
        """
        planned = decided.configurations[name].network
        self._check()
        if self.pretrained is not None:
            start = pretrained_start(
                self.pretrained,
                mode=self.pretrained_mode,
                frozen_epochs=self.freeze_epochs,
                on_message=say,
            )
            return planned, start
        if self.init is None:
            return planned, None
        donor = read_init(self.init, decided, name, fold)
        spec = form_of(donor, planned) if self.init_form else planned
        start = donated_start(
            donor, decided, spec, fold=fold, frozen_epochs=self.freeze_epochs, on_message=say
        )
        return spec, start

    def _check(self) -> None:
        if self.pretrained is not None and self.init is not None:
            raise UsageError("--pretrained and --init exclude each other: give one of them.")
        if self.init_form and self.init is None:
            raise UsageError("--init-form: goes with --init MODEL, whose form it takes.")
        if self.freeze_epochs is not None and self.pretrained is None and self.init is None:
            raise UsageError(
                "--freeze-epochs: nothing to keep fixed; it goes with --pretrained FILE or "
                "--init MODEL."
            )


def pretrained_start(
    path: Path,
    *,
    mode: str = "exact",
    frozen_epochs: int | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Start:
    """Return the start that VMamba-T weights give a Swin-UMamba.

    Args:
        path: ``.pth`` file as released, or the same tensors as ``.safetensors``.
        mode: ``exact`` loads what the official loader loads; ``corrected`` leaves out the norm
            bias that it loads, through a typo, without the norm's weight.
        frozen_epochs: epochs for which the encoder stays fixed; None is a hundredth of the run, at
            most 10, as in the official schedule.
        on_message: called with what became of the file's tensors.

    Raises:
        UsageError: there is no such mode.
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: the file is missing, damaged or holds no tensors.
    """
    from medmamba.networks.pretrained import frozen_parameters

    if mode not in MODES:
        raise UsageError(f"pretrained mode '{mode}': choose one of {', '.join(MODES)}.")
    state = read_tensors(path)

    def fill(network: "nn.Module") -> dict[str, Any]:
        return _fill(network, state, mode, path, on_message)

    return Start(
        source=path.name,
        identity=(hash_file(path), mode),
        fill=fill,
        frozen=frozen_parameters,
        frozen_epochs=frozen_epochs,
    )


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a state dict from a foreign ``.pth`` or a ``.safetensors`` file.

    Raises:
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: the file is missing, damaged or holds no tensors.
    """
    from medmamba.interop.donor import SAFETENSORS, bare_state
    from medmamba.interop.pickle_reader import read_foreign_pickle
    from medmamba.networks.weights import load_weights

    if path.suffix.lower() == SAFETENSORS:
        return load_weights(path)
    advice = (
        "Give VMamba-T's released file (vssmtiny_dp01_ckpt_epoch_292.pth), or its tensors as "
        "safetensors."
    )
    return bare_state(read_foreign_pickle(path), f"pretrained weights {path}", advice)


def _fill(
    network: "nn.Module",
    state: "Mapping[str, Tensor]",
    mode: str,
    path: Path,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    from medmamba.networks.pretrained import start_from_vmamba

    report = start_from_vmamba(network, state, mode=mode)  # type: ignore[arg-type]
    if say is not None:
        say(f"pretrained {path.name}: {report.summary}")
        for reason, names in report.skipped_by_reason.items():
            more = ", ..." if len(names) > NAMES_SHOWN else ""
            say(f"  {len(names)} skipped, {reason}: {', '.join(names[:NAMES_SHOWN])}{more}")
    return {"file": path.name, **to_plain(report)}


def read_init(path: Path, decided: "Plan", configuration: str, fold: int | str) -> "Donor":
    """Read the trained model that a run is to begin with.

    Raises:
        SecurityError, BundleError, PlanError: see ``medmamba.interop.donor.read_donor``.
    """
    from medmamba.interop.donor import read_donor

    branch = decided.configurations[configuration]
    return read_donor(
        path, network=branch.network.name, configuration=configuration, fold=str(fold)
    )


def form_of(donor: "Donor", planned: "NetworkSpec") -> "NetworkSpec":
    """Return the donor's network with the channels, outputs and patch of this plan.

    Raises:
        BundleError: the donor does not say what its network is, or it is another one.
    """
    if donor.spec is None:
        raise BundleError(
            f"--init-form: {donor.source} holds tensors alone and says nothing of their network. "
            "Leave --init-form away, or give a model folder or a checkpoint with its plans."
        )
    if donor.spec.name != planned.name:
        raise BundleError(
            f"--init-form: {donor.source} is a {donor.spec.name}, this run trains {planned.name}. "
            f"Plan and train --network {donor.spec.name}."
        )
    return dataclasses.replace(
        donor.spec,
        in_channels=planned.in_channels,
        out_channels=planned.out_channels,
        patch_size=planned.patch_size,
    )


def donated_start(
    donor: "Donor",
    decided: "Plan",
    spec: "NetworkSpec",
    *,
    fold: int | str,
    frozen_epochs: int | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Start:
    """Return the start that a trained model gives a network of its form.

    Heads are taken over where the labels are the same and made anew where they are not. Nothing
    else may differ but the number of image channels.

    Args:
        donor: the trained weights.
        decided: plan of the run.
        spec: the network of the run.
        fold: of the run.
        frozen_epochs: epochs for which all but heads and first layers stay fixed; 0 when None.
        on_message: called with what became of every tensor.
    """
    from medmamba.networks.transfer import heads_of, stems_of

    free = heads_of(spec) | stems_of(spec)

    def fill(network: "nn.Module") -> dict[str, Any]:
        return _fill_from_donor(network, spec, donor, decided, fold, on_message)

    return Start(
        source=donor.source,
        identity=(donor.sha256, donor.fold or ""),
        fill=fill,
        frozen=lambda network: [n for n, _ in network.named_parameters() if n not in free],
        frozen_epochs=frozen_epochs or 0,
    )


def _fill_from_donor(
    network: "nn.Module",
    spec: "NetworkSpec",
    donor: "Donor",
    decided: "Plan",
    fold: int | str,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    from medmamba.interop.donor import under_own_names
    from medmamba.networks.transfer import transfer

    what = donor.source if donor.spec is None else f"{donor.source} ({donor.spec.name})"
    report = transfer(
        network,
        spec,
        under_own_names(donor.state, network.state_dict()),
        new_heads=_why_new_heads(donor, decided),
        what=f"{what} as the start of {spec.name}",
    )
    if say is not None:
        first, *rest = report.lines
        say(f"init {what}: {first}")
        for line in [*rest, *_cautions(donor, decided, fold)]:
            say(line)
    return {"source": donor.source, "sha256": donor.sha256, **to_plain(report)}


def _why_new_heads(donor: "Donor", decided: "Plan") -> str:
    if donor.label_map is None:
        return "heads, as the file does not say what its outputs mean"
    if donor.label_map == decided.label_map:
        return ""
    found, needed = (", ".join(one.foreground) for one in (donor.label_map, decided.label_map))
    if found == needed:
        return "heads, as the labels have other values"
    return f"heads, for labels {needed} instead of {found}"


def _cautions(donor: "Donor", decided: "Plan", fold: int | str) -> list[str]:
    """What a person should know who reads the scores of such a run."""
    said = []
    if donor.channels and donor.channels != decided.channel_names:
        given, own = ", ".join(donor.channels), ", ".join(decided.channel_names)
        said.append(f"  note: its image channels are {given}, those here {own}")
    if donor.dataset_name == decided.dataset_name and donor.fold not in (None, str(fold)):
        said.append(
            f"  note: it was trained on fold {donor.fold} of this dataset and may have seen the "
            f"validation cases of fold {fold}; their scores are no estimate for new cases"
        )
    return said
