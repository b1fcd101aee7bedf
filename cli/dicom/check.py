"""What check.sh cannot say in shell: compare decoded segments, speak to Orthanc, find ports."""

import json
import socket
import sys
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK


def same(segmentation: str, mask: str, decoded: str) -> None:
    """Every segment as dcmqi decoded it equals the NIfTI mask at the same places in space.

    dcmqi writes one file per segment, on a grid that may run along other axes and be cropped.
    """
    labels = nibabel.load(mask)
    values = np.asarray(labels.dataobj)
    segments = pydicom.dcmread(segmentation, stop_before_pixels=True).SegmentSequence
    found = sorted(
        Path(decoded).glob("*.nii*"), key=lambda path: int(path.name.split("-")[0].split(".")[0])
    )
    names = json.loads((Path(decoded) / "meta.json").read_text())["segmentAttributes"]
    numbers = [group[0]["labelID"] for group in names]
    built = np.zeros(values.shape, np.int64)
    for path, number in zip(found, numbers, strict=True):
        image = nibabel.load(path)
        voxels = np.argwhere(np.asarray(image.dataobj) > 0)
        to_mask = np.linalg.inv(labels.affine) @ image.affine
        places = voxels @ to_mask[:3, :3].T + to_mask[:3, 3]
        indices = np.rint(places).astype(int)
        require(np.abs(places - indices).max(initial=0) < 1e-2, f"{path.name}: off the grid")
        require(not built[tuple(indices.T)].any(), f"{path.name}: overlaps another segment")
        built[tuple(indices.T)] = number
    # Numbers of segments against values of labels, which need not be consecutive.
    pairs = {
        (int(number), int(value))
        for number, value in zip(built.ravel(), values.ravel(), strict=True)
    }
    partners = dict(pairs)
    require(len(pairs) == len(partners) == len(set(partners.values())), f"voxels differ: {pairs}")
    require(partners.get(0) == 0, "background differs")
    named = sum(number > 0 for number in partners)
    print(
        f"   {len(found)} of {len(segments)} segments decoded, {int((built > 0).sum())} voxels of "
        f"{named} labels, 0 of {values.size} voxels differ"
    )


def filled(mask: str, names: str, folder: str) -> None:
    """Contours that another program has filled give every label's voxels."""
    values = np.asarray(nibabel.load(mask).dataobj).transpose(2, 1, 0)
    total = 0
    known = {name: value for name, value in json.loads(Path(names).read_text()).items() if value}
    for name, value in known.items():
        image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(Path(folder) / f"{name}.nrrd")))
        different = int(((image > 0) != (values == value)).sum())
        require(different == 0, f"{name}: {different} voxels differ")
        total += int((image > 0).sum())
    print(f"   {len(known)} structures filled, {total} voxels, 0 of {values.size} voxels differ")


def ports() -> None:
    """Two ports that are free on the loopback."""
    sockets = [socket.socket() for _ in range(2)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    print(*(item.getsockname()[1] for item in sockets))


def alive(port: str) -> None:
    """Whether Orthanc answers."""
    try:
        fetch(port, "system")
    except (urllib.error.URLError, ConnectionError):
        sys.exit(1)


def stored(segmentation: str, port: str) -> None:
    """Orthanc holds the object, and gives back the same attributes and pixels."""
    own = pydicom.dcmread(segmentation)
    query = json.dumps({"Level": "Instance", "Query": {"SOPInstanceUID": str(own.SOPInstanceUID)}})
    [instance] = json.loads(fetch(port, "tools/find", query.encode()))
    back = pydicom.dcmread(BytesIO(fetch(port, f"instances/{instance}/file")))
    require(back == own, "Orthanc gives back another object")
    if "PixelData" not in own:
        print(f"   stored and given back unchanged: {len(own.ROIContourSequence)} structures")
        return
    require(back.PixelData == own.PixelData, "Orthanc gives back other pixels")
    print(f"   stored and given back unchanged: {len(own.PixelData)} bytes of pixels")


def fetch(port: str, path: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", data, timeout=10) as answer:
        return bytes(answer.read())


def require(holds: bool, problem: str) -> None:
    if not holds:
        sys.exit(f"   DIFFERENT: {problem}")


TASKS = {task.__name__: task for task in (same, filled, ports, alive, stored)}

if __name__ == "__main__":
    TASKS[sys.argv[1]](*sys.argv[2:])
