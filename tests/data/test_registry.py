"""The registry of the sixteen datasets."""

import dataclasses
import re

import pytest

from medmamba.data import registry

# As printed in the published table: precision, sensitivity, specificity, F1, accuracy (all %), AUC.
TABLE = {
    "pad-ufes-20": (38.4, 36.9, 89.9, 35.8, 58.8, 0.808),
    "cervical-us": (81.2, 76.2, 94.9, 78.0, 86.2, 0.952),
    "fetal-planes-db": (92.2, 93.9, 98.7, 93.0, 94.0, 0.993),
    "cpn-xray": (97.2, 97.2, 98.5, 97.2, 97.1, 0.995),
    "kvasir": (78.7, 78.8, 97.0, 78.6, 78.8, 0.973),
    "otoscopy2024": (86.0, 84.4, 98.6, 85.2, 89.5, 0.989),
    "pathmnist": (94.0, 94.7, 99.4, 94.2, 95.3, 0.997),
    "dermamnist": (67.3, 50.1, 93.6, 51.6, 77.9, 0.917),
    "octmnist": (92.8, 91.8, 97.3, 91.8, 91.8, 0.992),
    "pneumoniamnist": (92.1, 87.0, 87.0, 88.6, 89.9, 0.965),
    "retinamnist": (35.9, 37.7, 87.5, 36.1, 54.3, 0.747),
    "breastmnist": (91.6, 72.6, 72.6, 76.6, 85.3, 0.825),
    "bloodmnist": (97.7, 97.7, 99.7, 97.7, 97.8, 0.999),
    "organamnist": (94.4, 93.3, 99.5, 93.8, 94.6, 0.998),
    "organcmnist": (92.2, 91.6, 99.3, 91.7, 92.7, 0.997),
    "organsmnist": (78.0, 77.4, 98.2, 76.3, 81.9, 0.982),
}
# The larger ones, accuracy and AUC, where somebody printed the paper's figures; the others are not known.
LARGER = {
    ("octmnist", "small"): (0.929, 0.991),
    ("pneumoniamnist", "small"): (0.936, 0.976),
    ("bloodmnist", "small"): (0.984, 0.999),
    ("organcmnist", "small"): (0.925, 0.997),
    ("pathmnist", "base"): (0.964, 0.999),
    ("dermamnist", "base"): (0.757, 0.925),
    ("octmnist", "base"): (0.927, 0.996),
    ("pneumoniamnist", "base"): (0.925, 0.973),
    ("breastmnist", "base"): (0.891, 0.849),
    ("organamnist", "base"): (0.953, 0.998),
}
CLASSES = dict(zip(TABLE, (6, 4, 6, 3, 8, 9, 9, 7, 4, 2, 5, 2, 8, 11, 11, 11), strict=True))


def test_sixteen_datasets() -> None:
    assert set(registry.names()) == {*TABLE, "chestmnist"}
    assert {name for name in registry.names() if registry.get(name).in_paper} == set(TABLE)


def test_the_sets_with_several_labels_and_with_grades() -> None:
    tasks = {name: registry.get(name).task for name in registry.names()}
    assert {name for name, task in tasks.items() if task == "multilabel"} == {"chestmnist"}
    assert {name for name, task in tasks.items() if task == "ordinal"} == {"retinamnist"}
    chest = registry.get("chestmnist")
    assert chest.num_classes == 14 and sum((chest.splits or {}).values()) == chest.n_images == 112120


@pytest.mark.parametrize("name", TABLE)
def test_published_figures_of_tiny(name: str) -> None:
    row = registry.get(name).published["tiny"]
    found = (row.precision, row.sensitivity, row.specificity, row.f1, row.accuracy, row.auc)
    assert found == pytest.approx([value / 100 if value > 1 else value for value in TABLE[name]], abs=1e-9)
    assert "README" in row.quoted_from


def test_published_figures_of_the_larger_ones() -> None:
    rows = {(name, v): row for name in TABLE for v, row in registry.get(name).published.items() if v != "tiny"}
    assert {key: (row.accuracy, row.auc) for key, row in rows.items()} == LARGER
    assert all(row.quoted_from and "MedMamba README" not in row.quoted_from for row in rows.values())  # it has T alone


@pytest.mark.parametrize("name", TABLE)
def test_entries_are_consistent(name: str) -> None:
    entry = registry.get(name)
    assert entry.num_classes == CLASSES[name] == len(set(entry.classes))
    assert (entry.task == "binary") == (entry.num_classes == 2)
    assert entry.channels in (1, 3) and entry.modality and entry.citation and entry.source.url.startswith("https://")
    assert set(entry.aliases) <= set(entry.classes)
    assert not entry.display_names or len(entry.display_names) == entry.num_classes
    if entry.splits is not None:
        assert list(entry.splits) == ["train", "val", "test"]
        assert sum(entry.splits.values()) == entry.n_images
    if entry.class_counts is not None:
        assert sum(entry.class_counts) == entry.n_images and len(entry.class_counts) == entry.num_classes
    for index, title in enumerate(entry.classes):
        for spelling in (
            title,
            title.upper(),
            title.replace(" ", "_"),
            entry.id2label[index],
            *entry.aliases.get(title, ()),
        ):
            assert entry.class_index(spelling) == index
    for rows in (entry.published.values(), entry.elsewhere):
        assert all(row.quoted_from and (row.accuracy is None or 0 < row.accuracy < 1) for row in rows)
    if entry.group_pattern:
        re.compile(entry.group_pattern)


def test_alphabetical_order_is_that_of_the_published_trainer() -> None:
    for name in registry.names():
        entry = registry.get(name)
        if entry.class_order in ("alphabetical", "assumed"):
            assert list(entry.classes) == sorted(entry.classes)


def test_medmnist_sets_carry_checksums_and_the_grey_or_colour_of_the_source() -> None:
    md5 = [value for name in registry.names() for value in registry.get(name).source.md5.values()]
    assert len(md5) == len(set(md5)) == 11 * 4 and all(re.fullmatch("[0-9a-f]{32}", value) for value in md5)
    grey = {name for name in registry.names() if registry.get(name).channels == 1}
    assert grey == {
        "octmnist", "pneumoniamnist", "breastmnist", "organamnist", "organcmnist", "organsmnist", "chestmnist",
    }  # fmt: skip
    stored_in_three = {name for name in registry.names() if registry.get(name).colour is not True} - grey
    assert stored_in_three == {"cpn-xray", "cervical-us", "fetal-planes-db"}
    assert not any(registry.get(name).colour for name in grey) and registry.get("cpn-xray").colour is False


def test_dermamnist_order_is_not_alphabetical() -> None:
    """The folders of the source sort melanocytic_nevi before melanoma; the official labels do not."""
    entry = registry.get("dermamnist")
    assert entry.class_index("melanoma") == 4 and entry.class_index("melanocytic_nevi") == 5
    assert entry.licence.non_commercial is True


def test_bars_of_the_zoo() -> None:
    best = {"breastmnist": 0.910, "pneumoniamnist": 0.973, "dermamnist": 0.817}
    for name, accuracy in best.items():
        row = registry.get(name).best_elsewhere
        assert row is not None and (row.model, row.accuracy) == ("MedViTV2-L", accuracy)
    assert registry.get("otoscopy2024").best_elsewhere is None


@pytest.mark.parametrize("spelling", ["PAD-UFES-20", "pad_ufes_20", "Pad-Ufes-20"])
def test_names_forgive_spelling(spelling: str) -> None:
    assert registry.get(spelling).name == "pad-ufes-20"


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(registry.RegistryError, match=r"no dataset 'kvasirr'.*kvasir, otoscopy2024") as caught:
        registry.get("kvasirr")
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)


def test_entries_cannot_be_changed() -> None:
    entry = registry.get("kvasir")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.title = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        entry.published["tiny"] = None  # type: ignore[index]


def test_the_page_in_the_docs_is_that_of_the_registry() -> None:
    from hub import datasets

    text = datasets.PAGE.read_text(encoding="utf-8")
    assert text == datasets.page(), "python -m hub.datasets"
    for name in registry.names():
        assert f"(`{name}`)" in text
    assert text.count(" / ") >= 16 + len(LARGER)
