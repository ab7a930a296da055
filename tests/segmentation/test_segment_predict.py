"""Prediction: masks at the image's own size, tiles, reflections, files."""

import numpy as np
import pytest
import torch
from dicom_images import write_dicom
from PIL import Image
from torch import nn

from medmamba.dense import tiles
from medmamba.segmentation import Segmentation, create_segmenter


class Threshold(nn.Module):
    """Stands for a trained network: the logit of a pixel is how far its first channel is above grey."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, :1]


@pytest.fixture
def thresholder():
    model = create_segmenter("test", ("bright",), size=64).eval()
    model.net = Threshold()
    return model


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 3 : width // 3 + width // 4] = True
    return np.where(mask, 230, 20).astype(np.uint8), mask


@pytest.mark.parametrize("crop_mode", ["squash", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (75, 213), (31, 40)])
def test_masks_lie_where_the_structure_is(thresholder, crop_mode, size):
    encoder = thresholder.config.encoder
    encoder = encoder.replace(preprocess={"input_size": (64, 64), "crop_mode": crop_mode})
    thresholder.config = thresholder.config.replace(encoder=encoder)
    pixels, mask = picture(*size)
    found = thresholder.predict(pixels)
    assert found.masks.shape == (1, *size)
    both = (found.masks[0] & mask).sum()
    assert 2 * both / (found.masks[0].sum() + mask.sum()) > 0.85
    region = found.regions[0]
    rows, columns = np.nonzero(mask)
    expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(region.box, expected)).max() <= 1 + max(size) / 64
    assert region.score > 0.9


@pytest.mark.parametrize("size", [(64, 64), (130, 97), (300, 64), (65, 500)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_cover_every_pixel_and_overlap_enough(size, overlap):
    covered = np.zeros(size, int)
    starts = set()
    for rows, columns in tiles(size, 64, overlap):
        covered[rows, columns] += 1
        assert rows.stop - rows.start == min(64, size[0]) and columns.stop - columns.start == min(64, size[1])
        starts.add(rows.start)
    assert covered.min() >= 1
    gaps = np.diff(sorted(starts))
    assert (gaps <= np.ceil(64 * (1 - overlap))).all()


def test_tiles_of_a_large_image_give_what_the_whole_gives(thresholder):
    pixels, mask = picture(300, 200)
    found = thresholder.predict(pixels, tile=64, overlap=0.25)
    assert (found.masks[0] == mask).mean() > 0.995  # at the resolution of the image, so sharper than the whole


def test_reflections_are_turned_back_before_they_are_averaged(thresholder):
    pixels, _ = picture(64, 64)
    plain, averaged = thresholder.predict(pixels), thresholder.predict(pixels, flips=True)
    np.testing.assert_allclose(plain.probabilities, averaged.probabilities, atol=1e-6)


def test_prediction_leaves_the_model_in_its_mode(segmenter):
    segmenter.train()
    a = segmenter.predict(picture(64, 64)[0]).probabilities
    b = segmenter.predict(picture(64, 64)[0]).probabilities
    assert segmenter.training and np.array_equal(a, b)


def test_exclusive_classes_are_the_most_probable_and_never_overlap():
    maps = np.array([[[0.2, 0.5, 0.1]], [[0.3, 0.1, 0.2]]], np.float32)  # two classes, three pixels
    background = 1 - maps.sum(0)
    found = Segmentation("x", ("a", "b"), maps, (0.5, 0.5), np.zeros((1, 3, 3), np.uint8), True, background)
    assert found.masks.astype(int).tolist() == [[[0, 1, 0]], [[0, 0, 0]]]
    assert found.label_map.tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match="exclusive"):
        found.with_thresholds(0.1)


def test_thresholds_are_applied_and_checked(thresholder):
    found = thresholder.predict(picture(64, 64)[0])
    assert found.with_thresholds(0.0).masks.all()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        found.with_thresholds(2)


def test_areas_are_in_mm2_where_the_file_says_how_large_a_pixel_is(thresholder, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    pixels, mask = picture(64, 64)
    path = tmp_path / "image.dcm"
    write_dicom(pydicom, path, pixels, [0.5, 0.25])
    found = thresholder.predict(path)
    assert found.spacing == (0.5, 0.25)
    assert found.regions[0].area_mm2 == pytest.approx(found.regions[0].area * 0.125)
    assert found.to_dict()["classes"][0]["area"] == found.masks.sum()


def test_masks_are_written_as_png_and_read_back(thresholder, tmp_path):
    found = thresholder.predict(picture(64, 64)[0])
    found.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")) == 255, found.masks[0])
    with pytest.raises(ValueError, match="suffix"):
        found.save(tmp_path / "mask.jpg")


def test_masks_are_written_as_nifti_with_the_spacing(thresholder, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    found = thresholder.predict(picture(64, 48)[0])
    for name in ("mask.nii", "mask.nii.gz"):
        image = nibabel.load(found.save(tmp_path / name))
        assert image.shape == (48, 64, 1)
        assert np.array_equal(np.asarray(image.dataobj)[:, :, 0].T, found.label_map)


def test_masks_are_written_as_a_dicom_segmentation_of_the_image(thresholder, tmp_path):
    pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    pixels, _ = picture(64, 48)
    write_dicom(pydicom, tmp_path / "image.dcm", pixels, [1, 1])
    found = thresholder.predict(tmp_path / "image.dcm")
    written = pydicom.dcmread(found.save(tmp_path / "seg.dcm", source=tmp_path / "image.dcm"))
    source = pydicom.dcmread(tmp_path / "image.dcm")
    assert written.Modality == "SEG" and written.SegmentSequence[0].SegmentLabel == "bright"
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert np.array_equal(written.pixel_array.reshape(64, 48) > 0, found.masks[0])
    with pytest.raises(ValueError, match="source="):
        found.save(tmp_path / "other.dcm")


def test_an_overlay_marks_the_region_and_leaves_the_rest(thresholder):
    pixels, mask = picture(64, 64)
    found = thresholder.predict(pixels)
    drawn = np.asarray(found.overlay(0.5)).astype(int)
    outside = ~found.masks[0]
    assert np.array_equal(drawn[outside], np.repeat(pixels[..., None], 3, 2)[outside])
    assert (drawn[found.masks[0]] != 230).any(1).all()
    with pytest.raises(ValueError, match="opacity"):
        found.overlay(2)


def test_not_finite_outputs_are_an_error(thresholder):
    with torch.no_grad():
        thresholder.net.scale.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="NaN"):
        thresholder.predict(picture(64, 64)[0])
