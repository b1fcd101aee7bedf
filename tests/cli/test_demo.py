"""The demo's chain from a raw dataset to a scored picture, on tiny ellipsoids."""

from medmamba.cli.app import main


def test_the_demo_ends_with_masks_scores_and_a_picture(
    write_raw_ellipsoids, tmp_path, capsys, monkeypatch
) -> None:
    raw = write_raw_ellipsoids(tmp_path / "Dataset901_Ellipsoids")
    out = tmp_path / "demo"
    monkeypatch.setattr(
        "sys.argv",
        ["medmamba", "demo", "--dataset", str(raw), "-o", str(out), "--max-time", "4s"],
    )
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (0, None)
    shown = capsys.readouterr().out
    assert "mean foreground Dice" in shown
    assert len(list((out / "masks").glob("*.nii.gz"))) == 2
    assert (out / "overlay.png").stat().st_size > 10_000
