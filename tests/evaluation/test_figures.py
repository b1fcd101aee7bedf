from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmamba.evaluation.figures import overlay_figure
from medmamba.evaluation.palette import label_colors
from medmamba.labels import LabelMap
from medmamba.volume import Geometry, Volume

MANY = LabelMap(values={"background": (0,), **{f"structure {i}": (i,) for i in range(1, 21)}})
TWO = LabelMap(values={"background": (0,), "front": (1,), "back": (2,)})


def case(
    shape: tuple[int, int, int], spacing_mm: tuple[float, ...], channels: int = 1
) -> tuple[Volume, np.ndarray]:
    """A dark image with a bright box, labelled 1 in its first half and 2 in the second."""
    labels = np.zeros(shape, dtype=np.uint8)
    box = tuple(slice(size // 4, max(size // 4 + 1, 3 * size // 4)) for size in shape)
    labels[box] = 1
    labels[..., shape[2] // 2 :][labels[..., shape[2] // 2 :] > 0] = 2
    array = np.repeat((labels[None] > 0) * 80.0 + 10, channels, axis=0).astype(np.float32)
    return Volume(array=array, geometry=Geometry.from_spacing(shape, spacing_mm)), labels


def colors_in(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def share_near(pixels: np.ndarray, color: str) -> float:
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    return float((np.abs(pixels - wanted).sum(axis=-1) < 60).mean())


@pytest.mark.parametrize(
    ("shape", "spacing", "channels"),
    [((12, 16, 14), (3.0, 1.0, 1.0), 1), ((1, 20, 24), (1.0, 0.5, 0.5), 3)],
)
def test_both_masks_are_visible_in_their_colours(
    tmp_path: Path, shape: tuple[int, int, int], spacing: tuple[float, ...], channels: int
) -> None:
    image, labels = case(shape, spacing, channels)
    path = tmp_path / "new" / "overlay.png"
    overlay_figure(image, labels[None], labels, TWO, path, title="case")
    pixels = colors_in(path)
    for color in label_colors(TWO.foreground).values():
        assert share_near(pixels, color) > 1e-3
    assert [entry.name for entry in path.parent.iterdir()] == ["overlay.png"]


def test_the_aspect_is_that_of_the_body(tmp_path: Path) -> None:
    thick, _ = case((8, 32, 32), (4.0, 1.0, 1.0))
    thin, _ = case((32, 32, 32), (1.0, 1.0, 1.0))
    shapes = []
    for name, image in (("thick", thick), ("thin", thin)):
        overlay_figure(image, None, None, TWO, tmp_path / f"{name}.png")
        shapes.append(colors_in(tmp_path / f"{name}.png").shape)
    assert shapes[0] == shapes[1]


def test_the_view_does_not_depend_on_how_the_file_is_stored(tmp_path: Path) -> None:
    image, labels = case((10, 16, 20), (1.5, 1.0, 1.0))
    image.array[0, :, :3, :5] = 60  # something that tells left from right
    turned_matrix = image.geometry.matrix[:, [2, 0, 1, 3]]
    turned_matrix[:3, 3] += turned_matrix[:3, 0] * 19
    turned_matrix[:3, 0] *= -1
    turned_labels = labels.transpose(2, 0, 1)[::-1]
    turned = Volume(
        array=image.array.transpose(0, 3, 1, 2)[:, ::-1],
        geometry=Geometry.from_matrix(turned_labels.shape, turned_matrix),
    )
    overlay_figure(image, labels, None, TWO, tmp_path / "plain.png")
    overlay_figure(turned, turned_labels, None, TWO, tmp_path / "turned.png")
    np.testing.assert_array_equal(
        colors_in(tmp_path / "plain.png"), colors_in(tmp_path / "turned.png")
    )


def test_empty_masks_and_many_labels_can_be_drawn(tmp_path: Path) -> None:
    image, labels = case((6, 12, 12), (1.0, 1.0, 1.0))
    overlay_figure(image, np.zeros_like(labels), np.zeros_like(labels), MANY, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_colours_differ_and_stay() -> None:
    colors = list(label_colors(str(i) for i in range(40)).values())
    assert len(set(colors)) == 40
    assert colors[:2] == list(label_colors(["x", "y"]).values())
