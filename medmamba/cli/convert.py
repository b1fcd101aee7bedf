"""``medmamba convert``: explicit conversions, the only commands that open foreign formats."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmamba.cli.examples import examples_of
from medmamba.cli.messages import say
from medmamba.cli.options import Json
from medmamba.errors import UsageError

if TYPE_CHECKING:
    from medmamba.bundle import Bundle
    from medmamba.pipeline.segmentations import Form

Mask = Annotated[Path, typer.Argument(metavar="MASK", help="Labels on the series' grid.")]
Series = Annotated[
    Path, typer.Argument(metavar="SERIES", help="Folder or zip archive of the DICOM series.")
]
DicomFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="DICOM file to write (.dcm).")
]
NamesOfModel = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="Model with the names and codes of the labels."
    ),
]
NamesOfFile = Annotated[
    Path | None,
    typer.Option(
        "--labels", metavar="FILE", help="dataset.json, or a JSON map name -> value, instead."
    ),
]
Algorithm = Annotated[
    str | None,
    typer.Option("--algorithm", help="What made the mask (default: the model's name)."),
]

convert = typer.Typer(
    name="convert",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Turn what other programs wrote into what medmamba reads, and back.",
    epilog=examples_of("convert"),
)


@convert.command("import-checkpoint", epilog=examples_of("convert import-checkpoint"))
def import_checkpoint(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Checkpoints (.pth) of nnU-Net or a fork; one per fold."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="MODEL",
            help="Model folder to write (default: beside the first file, named after it).",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model (default: dataset and network).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn official checkpoints into a model folder for [cyan]medmamba predict[/cyan].

    Reads what the trainers of nnU-Net, U-Mamba (both releases), LightM-UNet, MambaClinix and
    Swin-UMamba write. Network and plan come from the file. Nothing in the file is run: anything but
    tensors and plain data is refused with code 7.
    """
    folder = output or files[0].with_name(f"{files[0].stem}-model")
    _require_free(folder, overwrite=overwrite)
    from medmamba.interop.checkpoint import import_checkpoints

    bundle = import_checkpoints(files, folder, name=name)
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(bundle.manifest))
        return
    _print_bundle(bundle)


@convert.command("import-nnunet", epilog=examples_of("convert import-nnunet"))
def import_nnunet(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Results folder of nnU-Net: TRAINER__PLANS__CONFIGURATION, or one above it.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="MODEL", help="Model folder to write.")
    ],
    configuration: Annotated[
        str | None,
        typer.Option(
            "--configuration", "-c", help="Which model, where FOLDER holds several (3d_fullres)."
        ),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option("--folds", metavar="0,1,...", help="Folds to take (default: all trained)."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="Checkpoint of every fold.")
    ] = "checkpoint_final.pth",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model (default: dataset and network).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a model that nnU-Net trained into a model folder for [cyan]medmamba predict[/cyan].

    All folds go in; predictions are their mean. With [cyan]predict --compat[/cyan] the masks equal
    nnU-Net's; by default they may differ near ties. Nothing in the checkpoints is run.
    """
    _require_free(output, overwrite=overwrite)
    from medmamba.interop.nnunet_results import find_results, import_results

    wanted = None if folds is None else [fold.strip() for fold in folds.split(",")]
    found = find_results(folder, configuration=configuration, folds=wanted, checkpoint=checkpoint)
    bundle = import_results(found, output, name=name)
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(bundle.manifest))
        return
    _print_bundle(bundle)


@convert.command("dicom-to-nifti", epilog=examples_of("convert dicom-to-nifti"))
def dicom_to_nifti(
    series: Annotated[
        Path, typer.Argument(metavar="SERIES", help="Folder or zip archive of one DICOM series.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Image to write (.nii.gz).")
    ],
) -> None:
    """Write a DICOM series as one image on its own grid, rescaled as each slice says.

    Judged as in [cyan]medmamba predict[/cyan]: a series with missing, doubled or damaged slices
    is refused with its reason (code 4). Nothing that names the patient is copied.
    """
    from medmamba.io import read_stored_image, suffix_of, write_image

    suffix_of(output)
    values, header = read_stored_image(series)
    write_image(output, values[0], header.geometry)
    for warning in header.warnings:
        say(warning)
    depth, height, width = header.geometry.shape
    print(f"{output}: {width} x {height} x {depth} voxels")


@convert.command("seg-to-dicom", epilog=examples_of("convert seg-to-dicom"))
def seg_to_dicom(
    mask: Mask,
    series: Series,
    output: DicomFile,
    model: NamesOfModel = None,
    labels: NamesOfFile = None,
    algorithm: Algorithm = None,
    labelmap: Annotated[
        bool,
        typer.Option("--labelmap", help="The newer, smaller kind, which few programs read yet."),
    ] = False,
) -> None:
    """Write a mask as a DICOM segmentation object (BINARY) of the series it was made from.

    The mask may be stored along other axes; it is turned to the series' planes, never resampled.
    Of patient and study only what the standard requires is copied.
    """
    _write_object("labelmap" if labelmap else "seg", mask, series, output, model, labels, algorithm)


@convert.command("seg-to-rtstruct", epilog=examples_of("convert seg-to-rtstruct"))
def seg_to_rtstruct(
    mask: Mask,
    series: Series,
    output: DicomFile,
    model: NamesOfModel = None,
    labels: NamesOfFile = None,
    algorithm: Algorithm = None,
) -> None:
    """Write a mask as contours, a DICOM RT structure set of the series it was made from.

    Contours run along the edges of voxels as plastimatch draws them (extra rtstruct); where there
    are holes, they run to them and back. Nothing is smoothed.
    """
    _write_object("rtstruct", mask, series, output, model, labels, algorithm)


def _write_object(
    form: "Form",
    mask: Path,
    series: Path,
    output: Path,
    model: Path | None,
    labels: Path | None,
    algorithm: str | None,
) -> None:
    from medmamba.pipeline.segmentations import seg_to_dicom as run_seg_to_dicom

    segments = run_seg_to_dicom(
        mask, series, output, model=model, labels=labels, algorithm=algorithm, form=form
    )
    kind = "structures" if form == "rtstruct" else "segments"
    print(f"{output}: {len(segments)} {kind} ({', '.join(item.name for item in segments[:6])}"
          f"{', ...' if len(segments) > 6 else ''})")  # fmt: skip


def _require_free(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder}: exists. Give another --output, or --overwrite to replace it.")


def _print_bundle(bundle: "Bundle") -> None:
    manifest, spec = bundle.manifest, bundle.configuration.network
    sizes = "x".join(str(size) for size in spec.patch_size)
    print(f"network   {spec.name}, {manifest.configuration}, patch {sizes}")
    print(f"channels  {', '.join(manifest.channels)}")
    print(f"labels    {', '.join(entry.name for entry in manifest.labels)}")
    print(f"folds     {', '.join(bundle.folds)}")
    print(f"model     {bundle.folder}")
    print(f"next      medmamba predict -i IMAGES -o MASKS -m {bundle.folder}")
