from pathlib import Path

import nibabel as nib
import numpy as np
from dicom_phantom import make_series, phantom, save
from typer.testing import CliRunner

from medmamba.cli.app import app


def test_a_series_becomes_one_image_on_its_grid(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    target = tmp_path / "ct.nii.gz"
    result = CliRunner().invoke(app, ["convert", "dicom-to-nifti", str(folder), "-o", str(target)])
    assert result.exit_code == 0, result.output
    image = nib.load(target)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, phantom())
    np.testing.assert_allclose(image.affine @ [0, 0, 1, 1], [40, 30, 13, 1], atol=1e-5)
