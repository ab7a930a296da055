"""A short run of the fuzzer in benchmarks/; `python benchmarks/fuzz.py` makes the long one."""

from pathlib import Path

import pytest

pytest.importorskip("pydicom", minversion="3.0")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    return fuzz


@pytest.mark.parametrize(
    ("files", "seconds", "seed"), [(150, 15, 11), pytest.param(4000, 60, 12, marks=pytest.mark.slow)]
)
def test_altered_files_are_read_right_or_refused(fuzz, files, seconds, seed):
    """No process dies, none hangs, and no answer differs from all other readers without a note."""
    campaign = fuzz.Campaign(seed)
    campaign.run(files, seconds)
    assert campaign.files > 0 and campaign.faults == []


def test_the_fuzzer_finds_faults(fuzz):
    """A reader that is wrong without a word is found, and so is one that dies."""
    import numpy as np

    campaign = fuzz.Campaign(0)
    sample = next(sample for sample in campaign.samples if sample.kind == "PNG")
    right = fuzz.read_there("pillow:PNG", sample.data)

    class Fixed:
        def __init__(self, answer):
            self.given = answer

        def ask(self, name, data):
            pass

        def answer(self):
            return self.given

    mine = right.values if right.values.ndim == 3 else right.values[..., None]
    for values, notes, outcome in (
        (mine, (), "same"),
        (1 - mine, (), "differs"),
        (1 - mine, ("warning: x: y",), "noted"),
        (mine[:-1], (), "differs"),
    ):
        campaign.here = Fixed(fuzz.Answer("image", np.asarray(values), notes))
        campaign.there = Fixed(right)
        assert campaign.judge(sample, sample.data)[0] == outcome
    campaign.here = Fixed(fuzz.Answer("died"))
    assert campaign.judge(sample, sample.data)[0] == "died"


def test_a_process_that_ends_is_found_and_started_again(fuzz):
    reader = fuzz.Reader(_ending)
    for data, outcome in ((b"good", "refused"), (b"end", "died"), (b"good", "refused")):
        reader.ask("", data)
        assert reader.answer().outcome == outcome
    reader.close()


def _ending(name, data):
    import os

    import fuzz

    if data == b"end":
        os._exit(3)
    return fuzz.Answer("refused")


def test_alterations_depend_on_the_seed_alone(fuzz):
    first, second = fuzz.Campaign(3), fuzz.Campaign(3)
    numbers = range(0, 4 * len(first.samples), 7)
    assert [first.altered(n)[2] for n in numbers] == [second.altered(n)[2] for n in numbers]
    kinds = {sample.kind for sample in first.samples}
    assert {"PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "DICOM RLE Lossless", "DICOM JPEG 2000"} <= kinds
    assert "# Altered" in (BENCHMARKS.parent / "docs" / "robustness.md").read_text(encoding="utf-8")
