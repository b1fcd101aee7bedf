"""Download of a Medical Segmentation Decathlon task for the demo, checked by MONAI's checksum."""

from pathlib import Path

from medmamba.errors import EnvironmentFault

HIPPOCAMPUS_TASK = "Task04_Hippocampus"


def download_task(task: str, parent: Path) -> Path:
    """Download and unpack a Decathlon task below ``parent``; nothing is done where it is already.

    Raises:
        EnvironmentFault: no network, a wrong checksum, or no space.
    """
    folder = parent / task
    if (folder / "dataset.json").is_file():
        return folder
    from monai.apps import DecathlonDataset, download_and_extract

    parent.mkdir(parents=True, exist_ok=True)
    try:
        download_and_extract(
            DecathlonDataset.resource[task],
            parent / f"{task}.tar",
            parent,
            hash_val=DecathlonDataset.md5[task],
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"{task}: the download failed ({error}). Check the network, or fetch the task yourself "
            f"and give its folder with --dataset.",
            code="E_DOWNLOAD",
        ) from error
    return folder
