"""The measured reliability of methods, which the app shows beside each."""

import json
import re
from pathlib import Path

from medmamba.explain import methods, recommended, reliabilities
from medmamba.explain.reliability import DEFAULT_LAYER, FILE

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_what_the_tables_of_the_documentation_say():
    text = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "medmamba" / "explain" / FILE).read_text(encoding="utf-8"))
    for name, entry in record["methods"].items():
        rows = re.findall(rf"^\| {re.escape(name)} \| \S+ \((\d+)%\) \| \S+ \((\d+)%\) \|", text, re.MULTILINE)
        shares = [[int(d) / 100, int(i) / 100] for d, i in rows]
        assert len(shares) == len(entry["shares"]) == 4 and list(entry["shares"].values()) == shares, name
        assert f"n = {record['images']}" in text


def test_every_method_was_measured_and_the_defaults_did_well():
    found = reliabilities()
    assert set(found) == set(methods())
    assert all(found[name].lowest >= 0.6 for name in recommended()) and len(recommended()) >= 2
    assert found["saliency"].level == "poor" and found["occlusion"].level == "mixed"
    assert "gradcam" in DEFAULT_LAYER and found["gradcam"].images == 100
    assert str(found["gradcam"]).startswith("measured well: better than chance on 63 to ")
