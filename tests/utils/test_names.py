"""Names are matched exactly first, and never folded until two different ones are equal."""

import itertools
import unicodedata

import pytest

from medmamba import create_model, data
from medmamba.data import DatasetError, Record, registry
from medmamba.evaluation import match_classes
from medmamba.explain.subject import resolve_target
from medmamba.utils.names import AmbiguousNameError, alike, canonical, find_name, shown, whole_number

DIFFERENT = [
    ("ER+", "ER-"), ("ER+", "ER\u2212"), ("ER", "ER+"), ("ER", "ER-"), ("<5 mm", ">5 mm"), ("<5 mm", "5 mm"),
    ("1.0", "10"), ("1-2", "12"), ("T1.5", "T15"), ("A*", "A"), ("C#", "C"), ("5 %", "5"), ("±1", "1"), ("-1", "1"),
    ("grade 1", "grade 11"), ("I", "ı"), ("Δ", "Λ"), ("a&b", "ab"), ("HPV16", "HPV18"), ("≥2", "2"), ("~5", "5"),
]  # fmt: skip
SAME = [
    ("normal_or-benign", "Normal or benign"), ("COVID-19", "covid19"), ("ＣＯＶＩＤ", "covid"), ("Straße", "STRASSE"),
    ("caf\u00e9", "cafe\u0301"), ("cat ", "cat"), ("cat\u00a0", "cat"), ("\ufeffcat", "cat"), ("ER -", "er\u2212"),
    ("01", "1"), ("1.0", "1"), ("１", "1"), ("Barrett's", "Barrett’s"), ("vascular  lesions", "vascular_lesions"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_names_that_differ_in_meaning_are_not_folded_together(one: str, other: str) -> None:
    assert find_name(one, [other]) is None and find_name(other, [one]) is None
    assert find_name(one, [other, one]) == 1


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_name_are_found_where_that_is_unambiguous(one: str, other: str) -> None:
    assert find_name(one, ["something else", other]) == 1 == find_name(other, ["something else", one])


def test_exact_names_go_first_and_ambiguous_ones_are_refused() -> None:
    assert find_name("cat", ["Cat", "cat", "CAT"]) == 1
    with pytest.raises(AmbiguousNameError, match=r"'CaT' could be any of 'Cat', 'cat'"):
        find_name("CaT", ["Cat", "cat"])
    with pytest.raises(AmbiguousNameError, match=r"'MASSE'.*'Maße', 'Masse'"):
        find_name("MASSE", ["Maße", "Masse"])
    with pytest.raises(AmbiguousNameError, match=r"caf\\xe9.*cafe\\u0301"):  # they look the same: escaped
        find_name("CAFÉ", ["caf\u00e9", "cafe\u0301"])
    assert find_name("bcc", [("BCC", "bcc"), ("MEL",)]) == 0
    assert find_name("", ["a", ""]) == 1 and find_name("  ", ["a"]) is None


def test_helpers() -> None:
    assert alike(["a", "A", "b", "B ", "c"]) == [("a", "A"), ("b", "B ")]
    assert alike(["1", "01", "x"], whole_number) == [("1", "01")]
    assert canonical("e\u0301\u200b ") == "\u00e9"
    assert shown("a", "b", limit=1) == "'a' and 1 more" and "\\udce9" in shown("caf\udce9")


def evaluated(classes: list[str], labels: list[str], training: dict | None = None) -> list[int]:
    config = create_model("test", num_classes=len(labels)).config.replace(
        id2label=dict(enumerate(labels)), training=training or {}
    )
    records = [Record(str(i), i) for i in range(len(classes))]
    return match_classes(data.ImageDataset(records, classes, None), config).labels.tolist()  # type: ignore[arg-type]


def test_evaluation_does_not_mix_up_positive_and_negative() -> None:
    assert evaluated(["ER+"], ["ER+", "ER-"]) == [0]
    assert evaluated(["ER-"], ["ER+", "ER-"]) == [1]
    for classes in itertools.permutations(["ER-", "ER+", "her2"]):
        assert evaluated(list(classes), ["ER+", "ER-", "HER2"]) == [
            ["ER+", "ER-", "her2"].index(name) for name in classes
        ]
    with pytest.raises(DatasetError, match="does not know ER;"):
        evaluated(["ER"], ["ER+", "ER-"])
    with pytest.raises(DatasetError, match=r"'a_b' could be any of 'a b', 'A-b'"):
        evaluated(["a_b"], ["a b", "A-b"])
    with pytest.raises(DatasetError, match=r"'Cat', 'cat' would all be the model's 'cat'"):
        evaluated(["Cat", "cat"], ["cat", "dog"])
    assert evaluated([unicodedata.normalize("NFD", "café"), "thé"], ["thé", "café"]) == [1, 0]


def test_short_names_of_the_registry_still_match() -> None:
    labels = list(registry.get("pathmnist").id2label.values())
    assert evaluated(["NORM", "TUM", "adi"], labels, {"dataset": "pathmnist"}) == [6, 8, 0]


def test_every_name_of_the_registry_finds_its_own_class() -> None:
    for name in registry.names():
        entry = registry.get(name)
        assert registry.get(name.upper()) is registry.get(entry.title) is entry
        for index, title in enumerate(entry.classes):
            for spelling in (title, title.upper(), title.replace(" ", "_"), *entry.aliases.get(title, ())):
                assert entry.class_index(spelling) == index, (name, spelling)
    for other in ("", "データbloodmnist", "bloodmnist+", "mnist"):
        with pytest.raises(registry.RegistryError, match="no dataset"):
            registry.get(other)


def test_targets_of_explanations() -> None:
    config = create_model("test", num_classes=3).config.replace(id2label={0: "ER+", 1: "ER-", 2: "er+"})
    assert resolve_target("ER+", config) == 0 and resolve_target("er-", config) == 1
    assert resolve_target("er+", config) == 2
    with pytest.raises(ValueError, match="could be any of 'ER\\+', 'er\\+'"):
        resolve_target("Er+", config)
