"""The labels of a model in the forms that viewers and DICOM objects want them."""

from medmamba.bundle import Bundle, Manifest
from medmamba.io.dicom_seg import SegmentLabel
from medmamba.io.viewer_labels import ViewerLabel


def viewer_labels(bundle: Bundle) -> tuple[ViewerLabel, ...]:
    """The values of masks with names and colours; a region goes by the value it is written as."""
    label_map = bundle.plan.label_map
    colors = {entry.name: entry.color for entry in bundle.manifest.labels}
    painted = dict(zip(label_map.foreground, label_map.region_order, strict=False))
    found = (
        ViewerLabel(value=painted.get(name, values[0]), name=name, color=colors[name])
        for name, values in label_map.foreground.items()
    )
    return tuple(sorted(found, key=lambda label: label.value))


def segments_of(manifest: Manifest) -> tuple[SegmentLabel, ...]:
    """What a bundle's labels are called, coded and coloured in DICOM outputs."""
    return tuple(
        SegmentLabel(name=entry.name, values=entry.values, color=entry.color, snomed=entry.snomed)
        for entry in manifest.labels
    )
