"""`medmamba predict --refuse-unusual`."""

import csv
import io
import json
from pathlib import Path

import pytest

from medmamba.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "demo" / "examples"
CELL, XRAY = EXAMPLES / "blood_basophil.webp", EXAMPLES / "chest_normal.jpeg"


def test_a_refused_image_has_the_reason_and_no_label(capsys):
    assert main(["predict", str(CELL), str(XRAY), "--csv", "--refuse-unusual"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert rows[0]["label"] == "basophil" and not rows[0]["error"]
    assert rows[1]["label"] == "" and "refused" in rows[1]["error"] and "1 of 2 images were refused" in said.err


def test_without_it_the_record_says_how_unusual_the_image_is(capsys, tmp_path):
    assert main(["predict", str(XRAY), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["label"] and record["unusual"] and record["unusual_level"] == "far"
    assert main(["predict", str(XRAY), "--refuse-unusual", "near", "--out", str(tmp_path / "a.jsonl")]) == 0
    (row,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert "refused" in json.loads(row)["error"]
    assert main(["predict", str(XRAY), "--out", str(tmp_path / "a.jsonl")]) == 2  # begun with other options
    capsys.readouterr()
    assert main(["predict", str(XRAY), "--refuse-unusual", "--per", "folder"]) == 2
    assert "--refuse-unusual" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["always", "0"])
def test_other_levels_are_refused(level):
    with pytest.raises(SystemExit):
        main(["predict", str(XRAY), "--refuse-unusual", level])
