"""The end of every help page: what people type, and what each line is for.

A test parses every line by the command that it shows.
"""

MODEL = "work/runs/lightm_unet_s/3d_fullres/fold_0"

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "plan": (
        ("Plan and preprocess for the default network", "plan Dataset004_Hippocampus -o work"),
        (
            "The plan that nnU-Net makes, for a GPU with 24 GB",
            "plan Dataset004_Hippocampus -o work --network plain_unet --gpu-memory 24",
        ),
        ("Only verify the files", "plan Dataset004_Hippocampus -o work --until verify"),
        (
            "See the decisions before any voxel is resampled",
            "plan Dataset004_Hippocampus -o work --no-preprocess --json",
        ),
    ),
    "preprocess": (
        (
            "Two more configurations in one pass",
            "preprocess Dataset004_Hippocampus -o work -c 2d -c 3d_lowres",
        ),
        (
            "After editing work/plans/plain_unet.json",
            "preprocess Dataset004_Hippocampus -o work --network plain_unet",
        ),
    ),
    "train": (
        ("Twenty minutes on fold 0", "train work --fold 0 --max-time 20m"),
        ("Go on after an interruption", "train work --fold 0 --max-time 20m --resume"),
        ("nnU-Net's schedule on all cases", "train work -n plain_unet --fold all --epochs 1000"),
        ("All folds on a Ray cluster", "train work --folds all --engine ray"),
    ),
    "predict": (
        ("A folder of images", f"predict -i images -o masks -m {MODEL}"),
        ("The mean of mirrored copies on one GPU", "predict -i images -o masks -m model --tta "
         "--device cuda:0"),
        ("Share 3 of 8 of an archive", "predict -i images -o masks -m model --shard 3/8"),
        ("A list of cases", "predict -i cases.jsonl --root archive -o masks -m model"),
        ("On all machines of a Ray cluster", "predict -i cases.jsonl -o masks -m model "
         "--engine ray"),
        ("The labels that nnU-Net gives", "predict -i images -o masks -m model --tta --compat"),
        (
            "Every phase of mixed DICOM series",
            "predict -i studies -o masks -m model --split-acquisitions",
        ),
        (
            "BIDS in, a BIDS derivative out",
            "predict -i bids -o bids/derivatives/masks -m model --bids-suffix T1w --layout bids",
        ),
        ("A summary for a script", "predict -i images -o masks -m model --json"),
    ),
    "index": (
        ("An archive, beside its images", "index archive -o archive/cases.jsonl"),
        (
            "Files of the same name in several folders",
            "index archive -o cases.jsonl --id-from path",
        ),
        ("Only cases that a model takes", f"index archive -o cases.jsonl -m {MODEL}"),
    ),
    "watch": (
        ("A folder that a scanner or router fills", "watch incoming masks -m model"),
        ("Take a case when CASE.done is there", "watch incoming masks -m model --marker .done"),
    ),
    "status": (
        ("How far is a run?", "status masks"),
        ("For a script", "status masks --json"),
    ),
    "evaluate": (
        ("Scores as a table, summary.json and metrics.csv", "evaluate labelsTs masks"),
        (
            "Another tolerance of the surface, files elsewhere",
            "evaluate labelsTs masks --nsd-tolerance 2 -o scores",
        ),
        ("Of those cases that were predicted", "evaluate labelsTs masks --allow-missing"),
    ),
    "compare": (
        (
            "Do the Mamba layers of a network help?",
            "compare work lightm_unet_s --twins --max-time 10m -o comparison",
        ),
        (
            "Two networks, equal epochs, two folds",
            "compare work plain_unet umamba_enc --epochs 100 --folds 0,1 -o comparison",
        ),
    ),
    "check": (
        ("Would a model take these images?", f"check images -m {MODEL}"),
        ("Is a dataset fit to train on?", "check Dataset004_Hippocampus --dataset"),
        ("Findings for a script", "check images --json"),
    ),
    "report": (
        ("With pictures of the images", "report masks -i images"),
        ("Numbers and masks alone", "report masks"),
    ),
    "select": (
        ("The best of all trained networks and pairs", "select work -o model"),
        (
            "One network of two, without pairs",
            "select work -n lightm_unet_s -n plain_unet --no-ensembles -o model",
        ),
    ),
    "demo": (
        ("As in the README", "demo -o demo_output"),
        ("A minute's run", "demo --tiny -o demo_output"),
        (
            "On a dataset of yours, with another network",
            "demo --dataset Dataset004_Hippocampus -n plain_unet --max-time 10m",
        ),
    ),
    "doctor": (
        ("Everything, with self-tests of the scan kernels", "doctor"),
        ("A health check, in a moment", "doctor --quick"),
        ("For a ticket", "doctor --json"),
    ),
    "info": (
        ("What a model is made for", f"info {MODEL}"),
        ("Which networks there are", "info networks"),
    ),
    "verify": (
        ("Does a model compute here what it computed at home?", f"verify {MODEL}"),
        ("Is every mask what its record says?", "verify masks"),
        ("Has none of 8 shares been forgotten?", "verify masks --expect-shards 8 -i cases.jsonl"),
    ),
    "convert": (
        ("A model that nnU-Net trained", "convert import-nnunet nnUNet_results/Dataset004_X "
         "-o model"),
        ("A DICOM series", "convert dicom-to-nifti series -o image.nii.gz"),
    ),
    "convert import-checkpoint": (
        ("One checkpoint", "convert import-checkpoint fold_0/checkpoint_final.pth -o model"),
        (
            "Two folds as one model",
            "convert import-checkpoint fold_0/checkpoint_final.pth fold_1/checkpoint_final.pth",
        ),
    ),
    "convert import-nnunet": (
        ("The one model below a folder", "convert import-nnunet nnUNet_results/Dataset004_X "
         "-o model"),
        (
            "Two folds of one of several configurations",
            "convert import-nnunet nnUNet_results/Dataset004_X -c 3d_fullres --folds 0,1 -o model",
        ),
    ),
    "convert dicom-to-nifti": (
        ("A folder of slices", "convert dicom-to-nifti series -o image.nii.gz"),
        ("An archive of them", "convert dicom-to-nifti series.zip -o image.nii.gz"),
    ),
    "convert seg-to-rtstruct": (
        ("A model's mask", "convert seg-to-rtstruct mask.nii.gz series -m model -o contours.dcm"),
        (
            "One that people drew",
            "convert seg-to-rtstruct mask.nii.gz series --labels dataset.json -o contours.dcm",
        ),
    ),
    "convert seg-to-dicom": (
        ("A model's mask", "convert seg-to-dicom mask.nii.gz series -m model -o mask.dcm"),
        (
            "One that people drew",
            "convert seg-to-dicom mask.nii.gz series --labels dataset.json -o mask.dcm",
        ),
    ),
}  # fmt: skip

NOTICE = "Research use only; not a medical device."

EXIT_CODES = {
    "0": "done",
    "1": "a bug, or training that had to stop",
    "2": "usage",
    "3": "dataset, plan or model invalid",
    "4": "some cases without a mask, or a difference found",
    "5": "no case with a mask",
    "6": "device, disk or folder unfit",
    "7": "a file refused as unsafe",
    "130, 143": "stopped by a signal; run again to go on",
}


def examples_of(command: str) -> str:
    """The epilogue of a command's help page, in rich's markup."""
    lines = ["[bold]Examples:[/bold]"]
    for purpose, line in EXAMPLES[command]:
        lines += ["", purpose, f"  [cyan]medmamba {line}[/cyan]"]
    return "\n".join(lines)


def exit_codes() -> str:
    """The epilogue of the program's help page."""
    codes = (f"  {code:8}  {meaning}" for code, meaning in EXIT_CODES.items())
    return "\n".join(
        ["[bold]Exit codes:[/bold]", *codes, "", "Research use only; not a medical device."]
    )
