"""Datasets of images and masks: every layout, and what is wrong with one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from segmentation_data import disc, write_pairs

from medmamba.data import DatasetError
from medmamba.segmentation.open import open_segmentation
from medmamba.training.dense_data import check_dense_splits


def save_mask(path, values):
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path, 4)
    return tmp_path


def test_folders_with_splits_are_read(discs):
    found = open_segmentation(discs, ("disc",))
    assert found.split_sizes == {"train": 24, "val": 6, "test": 6}
    image, mask = found.split("val").load(0)
    assert image.size == (48, 40) and mask.shape == (1, 48, 40)
    assert np.array_equal(mask[0] == 1, disc((48, 40), 100)[1])


def test_a_csv_gives_splits_and_patients(folder):
    rows = ["image,mask,split,patient"]
    for i in range(4):
        rows.append(f"images/p{i:03d}_a.png,masks/p{i:03d}_a.png,{'train' if i < 3 else 'test'},P{i}")
    (folder / "table.csv").write_text("\n".join(rows))
    found = open_segmentation(folder / "table.csv", ("disc",))
    assert found.split_sizes == {"train": 3, "test": 1}
    assert [pair.patient for pair in found.examples] == ["P0", "P1", "P2", "P3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/p000_a.png,,train", "line 2: no mask"),
        ("images/p000_a.png,masks/none.png,train", "no file masks/none.png"),
        ("../images/p000_a.png,masks/p000_a.png,train", "leads out"),
        ("images/p000_a.png,masks/p000_a.png,holdout", "split 'holdout'"),
    ],
)
def test_a_wrong_row_of_a_csv_is_named(folder, row, message):
    (folder / "table.csv").write_text(f"image,mask,split\n{row}\n")
    with pytest.raises(DatasetError, match=message):
        open_segmentation(folder / "table.csv")


def test_pascal_voc_is_read(tmp_path):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    values = np.zeros((20, 30), np.uint8)
    values[2:5, 3:9], values[10:12] = 2, 255
    for name in ("a", "b"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(values, "P")
        picture.putpalette(list(range(256)) * 3)
        picture.save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\n")
    found = open_segmentation(tmp_path, ("cat", "dog"))
    assert found.exclusive and found.split_sizes == {"train": 1, "val": 1}
    assert np.array_equal(found.load(0)[1][0], values)


def coco(tmp_path, annotations, categories=((7, "cell"), (9, "dot"))):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": annotations,
    }
    (tmp_path / "coco.json").write_text(json.dumps(data))
    return tmp_path / "coco.json"


def test_coco_polygons_and_run_lengths_are_read(tmp_path):
    pytest.importorskip("pycocotools")
    square = [[2, 3, 8, 3, 8, 9, 2, 9]]  # x 2 to 8, y 3 to 9
    dots = np.zeros((20, 30), np.uint8)
    dots[15, 20] = 1
    runs = {"size": [20, 30], "counts": [20 * 20 + 15, 1, 600 - 20 * 20 - 16]}  # by columns
    path = coco(
        tmp_path,
        [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": square},
            {"id": 2, "image_id": 1, "category_id": 9, "segmentation": runs, "iscrowd": 1},
        ],
    )
    found = open_segmentation(path)
    assert found.classes == ("cell", "dot") and found.exclusive
    mask = found.load(0)[1][0]
    assert (mask[3:9, 2:8] == 1).all() and (mask == 1).sum() == 36
    assert np.array_equal(mask == 2, dots == 1)
    planes = open_segmentation(path, exclusive=False).load(0)[1]
    assert planes.shape == (2, 20, 30) and planes[1].sum() == 1


def test_a_box_alone_is_no_mask(tmp_path):
    pytest.importorskip("pycocotools")
    path = coco(tmp_path, [{"id": 5, "image_id": 1, "category_id": 7, "bbox": [1, 1, 3, 3]}])
    with pytest.raises(DatasetError, match="annotation 5 has no segmentation"):
        open_segmentation(path).load(0)


def test_an_annotation_of_nothing_is_named(tmp_path):
    with pytest.raises(DatasetError, match="annotation 5"):
        open_segmentation(coco(tmp_path, [{"id": 5, "image_id": 2, "category_id": 7}]))


def test_an_image_without_its_mask_and_a_mask_without_its_image_are_named(folder):
    (folder / "masks" / "p001_a.png").unlink()
    shutil.copy(folder / "masks" / "p000_a.png", folder / "masks" / "extra.png")
    with pytest.raises(DatasetError, match=r"1 images have no mask: p001_a\.png; 1 masks have no image: extra\.png"):
        open_segmentation(folder)


def test_masks_may_end_in_mask(folder):
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert len(open_segmentation(folder)) == 4


def test_a_mask_of_another_size_is_named(folder):
    save_mask(folder / "masks" / "p002_a.png", np.zeros((40, 48), np.uint8))
    with pytest.raises(DatasetError, match=r"p002_a\.png: the mask has 40x48 pixels, its image 48x40"):
        open_segmentation(folder).load(2)


def test_an_empty_mask_is_an_image_with_nothing_to_segment(folder):
    save_mask(folder / "masks" / "p002_a.png", np.zeros((48, 40), np.uint8))
    assert not open_segmentation(folder).load(2)[1].any()


def test_a_value_that_names_no_class_is_named(folder):
    save_mask(folder / "masks" / "p002_a.png", np.full((48, 40), 3, np.uint8) * (np.arange(40) > 20).astype(np.uint8))
    with pytest.raises(DatasetError, match="values 3 name no class"):
        open_segmentation(folder, ("a", "b")).load(2)


def test_class_numbers_are_not_taken_for_one_class(folder):
    values = np.zeros((48, 40), np.uint8)
    values[:10], values[20:30] = 1, 2
    save_mask(folder / "masks" / "p002_a.png", values)
    with pytest.raises(DatasetError, match="one class was named"):
        open_segmentation(folder, ("a",)).load(2)


@pytest.mark.parametrize("white", [1, 7, 255])
def test_any_second_value_is_the_one_class(folder, white):
    mask = disc((48, 40), 2)[1]
    save_mask(folder / "masks" / "p002_a.png", mask.astype(np.uint8) * np.uint8(white))
    assert np.array_equal(open_segmentation(folder).load(2)[1][0] == 1, mask)


def test_a_jpeg_mask_has_seams_and_is_read(folder):
    mask = disc((48, 40), 2)[1]
    (folder / "masks" / "p002_a.png").unlink()
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / "p002_a.jpg", quality=95)
    assert np.array_equal(open_segmentation(folder).load(2)[1][0] == 1, mask)


def test_a_colour_picture_is_no_mask(folder):
    save_mask(folder / "masks" / "p002_a.png", np.random.default_rng(0).integers(0, 255, (48, 40, 3), np.uint8))
    with pytest.raises(DatasetError, match="colour picture"):
        open_segmentation(folder).load(2)


def test_a_damaged_mask_is_named(folder):
    (folder / "masks" / "p002_a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    with pytest.raises(DatasetError, match=r"p002_a\.png"):
        open_segmentation(folder).load(2)


def test_another_layout_is_described(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DatasetError, match="a CSV with columns image and mask"):
        open_segmentation(tmp_path)
    with pytest.raises(DatasetError, match="no such folder or file"):
        open_segmentation(tmp_path / "none")


def test_splits_keep_patients_together_and_a_patient_in_two_is_refused(tmp_path):
    write_pairs(tmp_path, 12)
    for folder in ("images", "masks"):
        for number, path in enumerate(sorted((tmp_path / folder).iterdir())):
            path.rename(path.with_name(f"q{number // 2}_{number}.png"))
    found = open_segmentation(tmp_path, patient_pattern="^(q[0-9]+)_").divided((0.5, 0.25, 0.25))
    assert set(found.split_sizes) == {"train", "val", "test"} and sum(found.split_sizes.values()) == 12
    check_dense_splits(found)
    import dataclasses

    first, second, *rest = found.examples
    pairs = (dataclasses.replace(first, split="train"), dataclasses.replace(second, split="test"), *rest)
    with pytest.raises(DatasetError, match="q0"):
        check_dense_splits(dataclasses.replace(found, examples=pairs))


def test_a_pattern_that_matches_nothing_is_refused(folder):
    with pytest.raises(DatasetError, match="matches none"):
        open_segmentation(folder, patient_pattern="^x([0-9])")
