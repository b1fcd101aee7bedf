"""What of trained weights another network takes over, and what it says of the rest."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from medmamba.errors import BundleError
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.transfer import heads_of, stems_of, transfer

SPEC = NetworkSpec(
    name="plain_unet",
    in_channels=1,
    out_channels=3,
    patch_size=(8, 8, 8),
    features=(4, 8, 8),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 3,
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1),
)
STEM = "encoder.stages.0.0.convs.0.conv.weight"


def weights(spec: NetworkSpec = SPEC, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build_network(spec).state_dict())


def test_heads_and_stems_are_found_without_their_names() -> None:
    assert heads_of(SPEC) == {
        f"decoder.seg_layers.{level}.{part}" for level in (0, 1) for part in ("weight", "bias")
    }
    assert stems_of(SPEC) == {STEM}


def test_everything_is_taken_where_labels_are_the_same() -> None:
    network, given = build_network(SPEC), weights()
    report = transfer(network, SPEC, {**given, "extra.weight": torch.ones(2)})
    assert set(report.loaded) == set(given)
    assert report.skipped == {"extra.weight": "this network has no such tensor"}
    assert all(torch.equal(network.state_dict()[name], given[name]) for name in given)


def test_heads_start_fresh_for_other_labels() -> None:
    network, given = build_network(SPEC), weights()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer(network, SPEC, given, new_heads="heads, for labels a instead of b")
    after = network.state_dict()
    for name in heads_of(SPEC):
        assert torch.equal(after[name], before[name]), "heads of equal shape start fresh too"
        assert report.remade[name] == report.skipped[name] == "heads, for labels a instead of b"
    assert report.lines[0] == f"{len(given) - 4} tensors loaded, 4 made anew, 4 skipped"
    assert "decoder.seg_layers.0" in report.lines[1]


def test_first_layer_for_more_channels_answers_equal_images_equally() -> None:
    wide = replace(SPEC, in_channels=3)
    one, three = build_network(SPEC).eval(), build_network(wide).eval()
    given = weights()
    one.load_state_dict(given)
    assert transfer(three, wide, given).inflated == (STEM,)
    image = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(three(image.expand(1, 3, 8, 8, 8)), one(image))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": (4, 8, 16)}, r"of another shape \(encoder.stages.2.0.convs.0.conv.weight \["),
        ({"decoder_blocks": (1, 2)}, r"2 missing|4 missing"),
    ],
)
def test_weights_of_another_form_are_refused_and_nothing_changes(change: dict, said: str) -> None:
    spec = replace(SPEC, **change)
    network = build_network(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(BundleError, match=said):
        transfer(network, spec, weights())
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


def test_diverged_weights_are_refused() -> None:
    given = weights()
    given[STEM][0] = float("nan")
    with pytest.raises(BundleError, match="NaN or infinity"):
        transfer(build_network(SPEC), SPEC, given)
