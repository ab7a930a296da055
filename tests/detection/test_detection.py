"""Detection: data, boxes that move with their images, the model, training from the command line."""

import json

import detection_data
import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.cli.main import main
from medmamba.config import ConfigError
from medmamba.data import DatasetError
from medmamba.detection import MedMambaDetector, create_detector
from medmamba.detection.dataset import open_detection
from medmamba.detection.predict import to_image

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A Pascal VOC folder of squares; read only."""
    return detection_data.write_voc(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return create_detector("test", ("bright", "dark"), size=64, channels=64).eval()


# --- data ---


def test_voc_is_read_with_its_splits_and_boxes(voc):
    found = open_detection(voc)
    assert found.classes == ("bright", "dark") and found.split_sizes == {"train": 32, "val": 8, "test": 8}
    image, boxes, labels = found.load(0)
    _, objects = detection_data.squares(0)
    assert image.size == (64, 64)
    assert boxes.tolist() == [list(map(float, box)) for _, box in objects]
    assert [found.classes[label] for label in labels] == [name for name, _ in objects]


def single(tmp_path, objects):
    root = detection_data.write_voc(tmp_path, 1, 0, 0)
    (root / "Annotations" / "s000.xml").write_text(detection_data.annotation(objects))
    return root


def test_a_box_without_extent_is_left_out_and_named(tmp_path):
    found = open_detection(single(tmp_path, [("a", (5, 5, 5, 20)), ("a", (1, 1, 9, 9))]))
    assert len(found.examples[0].boxes) == 1 and "1 boxes smaller than a pixel" in found.notes[0]


def test_a_box_outside_of_the_image_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"s000\.xml: box .* outside of s000\.jpg"):
        open_detection(single(tmp_path, [("a", (40, 40, 90, 60))])).load(0)


def test_an_unknown_class_and_an_image_without_annotation_are_named(tmp_path, voc):
    with pytest.raises(DatasetError, match="unknown classes dark"):
        open_detection(voc, ("bright",))
    root = single(tmp_path, [("a", (1, 1, 9, 9))])
    (root / "Annotations" / "s000.xml").unlink()
    with pytest.raises(DatasetError, match=r"1 images have no annotation: s000\.jpg"):
        open_detection(root)


@pytest.mark.parametrize("text", ["<annotation><object></annotation>", "<!DOCTYPE x><annotation/>", "<a><object/></a>"])
def test_a_damaged_or_hostile_annotation_is_refused(tmp_path, text):
    root = single(tmp_path, [])
    (root / "Annotations" / "s000.xml").write_text(text)
    with pytest.raises(DatasetError, match=r"s000\.xml"):
        open_detection(root, ("a",))


def test_coco_and_csv_give_the_same_boxes(tmp_path):
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "b.png")
    data = {
        "images": [{"id": 4, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "cell"}, {"id": 1, "name": "dot"}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 3, "bbox": [5, 6, 10, 20]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(data))
    rows = ["image,label,left,top,right,bottom,split", "a.png,cell,5,6,15,26,train", "b.png,,,,,,val"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    coco = open_detection(tmp_path / "coco.json", ("dot", "cell"))
    table = open_detection(tmp_path / "boxes.csv", ("dot", "cell"))
    for found in (coco, table):
        assert found.examples[0].boxes.tolist() == [[5, 6, 15, 26]] and found.examples[0].labels.tolist() == [1]
        assert len(found.examples[1].boxes) == 0
    assert table.split_sizes == {"train": 1, "val": 1}


# --- geometry ---


def test_boxes_move_with_their_images():
    from medmamba.training import augment
    from medmamba.training.detection import move_boxes
    from medmamba.training.recipe import load_recipe

    recipe, rng = load_recipe("detect"), np.random.default_rng(1)
    drawn = augment.draw(recipe, 24, rng)
    theta = augment.affine(drawn, 1.0, torch.device("cpu"))
    images, boxes = torch.zeros(24, 3, 96, 96), []
    for image in images:
        x, y = rng.integers(20, 50, 2)
        image[:, y : y + 20, x : x + 26] = 1
        boxes.append(torch.tensor([[x, y, x + 26, y + 20]], dtype=torch.float32))
    plain = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "blur", "noise", "gamma", "erase"), 0.0)
    only = recipe.replace(**{f"augment.{name}": value for name, value in plain.items()}).augment
    moved = augment.augment(images, drawn, only, (96, 96))
    checked = 0
    for image, box, matrix in zip(moved, boxes, theta, strict=True):
        found, kept = move_boxes(box, matrix, (96, 96))
        bright = (image[0] > 0.5).nonzero()
        if not kept.any() or len(bright) == 0:
            continue
        (top, left), (bottom, right) = bright.amin(0).tolist(), (bright.amax(0) + 1).tolist()
        expected = torch.tensor([left, top, right, bottom])
        margin = (image[0].sum() != 0) and min(left, top, 96 - right, 96 - bottom) > 0  # reflections touch the border
        if margin:
            assert (found[0] - expected).abs().max() <= 1.5
            checked += 1
    assert checked >= 8


def test_what_is_mostly_cropped_away_is_left_out():
    from medmamba.training.detection import move_boxes

    zoom = torch.tensor([[0.5, 0, -0.5], [0, 0.5, -0.5]])  # shows the upper left quarter
    boxes = torch.tensor([[0.0, 0, 20, 20], [44, 0, 54, 10], [45, 45, 90, 90], [60, 60, 80, 80]])
    found, kept = move_boxes(boxes, zoom, (100, 100))
    assert kept.tolist() == [True, True, False, False]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 40, 40], [88, 0, 100, 20]]))


def test_boxes_return_to_the_image_from_a_padded_input():
    boxes = to_image(torch.tensor([[0.0, 16, 64, 48], [-5, 0, 32, 32]]), (100, 200), (32, 64), (0, 16))
    assert boxes.tolist() == [[0, 0, 200, 100], [0, 0, 100, 50]]


# --- model and metrics ---


def test_a_saved_detector_is_the_same(detector, tmp_path):
    folder = detector.save_pretrained(tmp_path)
    pixels, _ = detection_data.squares(0)
    first = detector.predict(pixels, score=0.0)
    second = MedMambaDetector.from_pretrained(folder).predict(pixels, score=0.0)
    assert len(first.boxes) > 0 and first.boxes == second.boxes
    with pytest.raises(ConfigError, match="MedMambaDetector"):
        medmamba.MedMamba.from_pretrained(folder)
    with pytest.raises(ConfigError, match="MedMambaDetector"):
        medmamba.MedMambaSegmenter.from_pretrained(folder)


def test_tiles_give_boxes_in_pixels_of_the_image(detector):
    pixels = np.zeros((150, 200, 3), np.uint8)
    found = detector.predict(pixels, tile=64, score=0.0)
    assert all(0 <= b.box[0] < b.box[2] <= 200 and 0 <= b.box[1] < b.box[3] <= 150 for b in found.boxes[:50])
    assert max(b.box[2] for b in found.boxes) > 128


def test_metrics_are_those_of_coco():
    pytest.importorskip("pycocotools")
    from medmamba.metrics.detection import evaluate_boxes

    true = [(np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]]), np.array([0, 0])), (np.zeros((0, 4)), np.zeros(0, int))]
    right = [(true[0][0], np.array([0.9, 0.8]), true[0][1]), (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))]
    assert evaluate_boxes(right, true, ("a",), resamples=20).metrics["map"]["value"] == pytest.approx(1)
    # A false box above one of two right ones: precision 1 up to recall .5, then 2/3.
    wrong = np.array([[60.0, 60, 70, 70]])
    more = (np.concatenate((true[0][0], wrong)), np.array([0.9, 0.5, 0.7]), np.array([0, 0, 0]))
    found = evaluate_boxes([more, right[1]], true, ("a", "b"), resamples=0)
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert found.metrics["map50 a"]["value"] == pytest.approx(expected)
    assert found.metrics["map50 b"]["value"] is None and found.counts == {"a": 2, "b": 0}
    nothing = [(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))] * 2
    assert evaluate_boxes(nothing, true, ("a",), resamples=5).metrics["map50"]["value"] == 0


@pytest.mark.slow
def test_agreement_with_torchmetrics():
    pytest.importorskip("pycocotools")
    kept = pytest.importorskip("torchmetrics.detection")
    from medmamba.metrics.detection import evaluate_boxes

    rng = np.random.default_rng(0)
    found, true = [], []
    for _ in range(20):
        boxes = rng.uniform(0, 80, (6, 2))
        boxes = np.concatenate((boxes, boxes + rng.uniform(8, 30, (6, 2))), 1)
        labels = rng.integers(0, 3, 6)
        true.append((boxes, labels))
        shaken = boxes + rng.normal(0, 2, boxes.shape)
        found.append((shaken, rng.uniform(0.1, 1, 6), np.where(rng.random(6) < 0.8, labels, rng.integers(0, 3, 6))))
    ours = evaluate_boxes(found, true, ("a", "b", "c"), resamples=0).metrics
    metric = kept.MeanAveragePrecision()
    as_tensor = torch.from_numpy
    metric.update(
        [{"boxes": as_tensor(b), "scores": as_tensor(s), "labels": as_tensor(n)} for b, s, n in found],
        [{"boxes": as_tensor(b), "labels": as_tensor(n)} for b, n in true],
    )
    theirs = metric.compute()
    assert ours["map"]["value"] == pytest.approx(float(theirs["map"]), abs=1e-6)
    assert ours["map50"]["value"] == pytest.approx(float(theirs["map_50"]), abs=1e-6)


# --- from the command line ---


def command(voc, out, epochs, *more):
    return [
        *("detect", "train", "--data", str(voc), "--out", str(out), "--variant", "test", "--size", "64"),
        *("--epochs", str(epochs), "--batch-size", "8", "--device", "cpu", "--quiet"),
        *("--set", "layer_decay=1", "lr=3e-3", "augment.crop_area=[0.8,1]", *more),
    ]


def test_training_prediction_and_evaluation(voc, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    assert main(command(voc, tmp_path / "run", 1)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["splits"]["test"]["n"] == 8
    capsys.readouterr()
    images = str(voc / "JPEGImages" / "s04*.jpg")
    model = str(tmp_path / "run")
    assert main(["detect", "predict", images, "--model", model, "--out", str(tmp_path / "out"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8 and set(lines[0]["counts"]) == {"bright", "dark"}
    assert Image.open(tmp_path / "out" / "s040_boxes.png").size == (64, 64)
    out = tmp_path / "m.json"
    assert main(["detect", "evaluate", "--model", model, "--data", str(voc), "--out", str(out)]) == 0
    value = json.loads(out.read_text())["metrics"]["map50"]["value"]
    assert value == pytest.approx(results["splits"]["test"]["metrics"]["map50"]["value"], abs=0.02)


@pytest.mark.slow
def test_a_detector_learns_squares(voc, tmp_path):
    pytest.importorskip("pycocotools")
    assert main(command(voc, tmp_path / "run", 30)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["splits"]["test"]["metrics"]["map50"]["value"] > 0.7


def test_turned_boxes_are_refused(voc, tmp_path, capsys):
    assert main(command(voc, tmp_path / "run", 1, "augment.rotate=45")) == 2
    assert "rot90" in capsys.readouterr().err


def test_one_pass_gives_the_detections_and_losses_of_two():
    model = create_detector("test", ("a", "b"), size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    boxes = [torch.tensor([[4.0, 4, 30, 34], [20, 20, 60, 50]]), torch.zeros(0, 4)]
    targets = [{"boxes": b, "labels": torch.arange(len(b))} for b in boxes]
    with torch.no_grad():
        raw, whole = model.raw(x), model(x)
        model.net.training = True  # the outermost alone: batch norms stay as they are
        losses = model(x, targets)
    for one, other in zip(raw.detections(), whole, strict=True):
        assert len(one["boxes"]) and all(torch.equal(one[name], other[name]) for name in other)
    assert raw.losses(targets) == losses


@pytest.mark.parametrize("label", ["orange", "blue"])
def test_a_label_can_be_read_on_any_image(label):
    from medmamba.dense.pictures import COLOURS
    from medmamba.detection.result import Box, Detection

    classes = ("orange", "b", "c", "d", "blue")  # of a light and a dark colour
    colour = COLOURS[classes.index(label)]
    noise = np.random.default_rng(0).integers(90, 110, (240, 320, 3), dtype=np.uint8)
    found = Detection("x", [Box(label, 0.9, (20.0, 30.0, 200.0, 150.0))], (240, 320), noise, classes)
    picture = np.asarray(found.overlay())[31:42, 21:70].reshape(-1, 3)
    ground = (picture == colour).all(1)
    letters = (picture < 80).all(1) if label == "orange" else (picture > 120).all(1)
    assert ground.sum() > 100 and letters.sum() > 10, "letters on a ground of their own"
    assert (np.asarray(found.overlay())[32:148, 100:198] == noise[32:148, 100:198]).all(), "the inside is as it was"
