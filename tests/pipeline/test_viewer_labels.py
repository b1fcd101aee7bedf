import dataclasses
from types import SimpleNamespace

from medmamba.labels import LabelMap
from medmamba.pipeline.label_forms import viewer_labels

from ..test_bundle import tiny_plan


def bundle(label_map: LabelMap) -> SimpleNamespace:
    entries = [
        SimpleNamespace(name=name, color=f"#00000{number}")
        for number, name in enumerate(label_map.foreground)
    ]
    return SimpleNamespace(
        plan=dataclasses.replace(tiny_plan(), label_map=label_map),
        manifest=SimpleNamespace(labels=entries),
    )


def test_classes_go_by_their_values() -> None:
    label_map = LabelMap(values={"background": (0,), "b": (2,), "a": (1,)})
    found = [(label.value, label.name, label.color) for label in viewer_labels(bundle(label_map))]
    assert found == [(1, "a", "#000001"), (2, "b", "#000000")]


def test_regions_go_by_the_value_they_are_written_as() -> None:
    regions = LabelMap(
        values={"background": (0,), "whole": (1, 2, 3), "core": (2, 3), "spot": (3,)},
        region_order=(1, 2, 3),
    )
    assert [(label.value, label.name) for label in viewer_labels(bundle(regions))] == [
        (1, "whole"),
        (2, "core"),
        (3, "spot"),
    ]
