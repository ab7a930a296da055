"""`medmamba evaluate` with subgroups and corruptions."""

import json

import numpy as np
import pytest
from PIL import Image

from medmamba.cli.main import main


@pytest.fixture
def trial(tiny_model, tmp_path):
    tiny_model.config = tiny_model.config.replace(id2label={0: "a", 1: "b", 2: "c"})
    tiny_model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = ["name,sex,age"]
    for label in "abc":
        (tmp_path / "data" / "test" / label).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "test" / label / f"{label}{i}.png")
            rows.append(f"{label}{i}.png,{'F' if i % 2 else 'M'},{20 + 5 * i}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows))
    return ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--quiet"]


def test_subgroups_of_a_metadata_file(trial, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--by", "sex,age", "--cuts", "age=40", "--resamples", "20", "--out", str(out)]
    assert main([*trial, *words]) == 0
    text = capsys.readouterr().out
    assert "### By sex" in text and "### By age" in text and "age: divided at 40 (as given)" in text
    assert text.strip() in (out / "results.md").read_text(encoding="utf-8")
    found = json.loads((out / "results.json").read_text())["splits"]["test"]["subgroups"]
    assert [group["name"] for group in found["groups"]] == ["F", "M", "below 40", "40 and above"]


def test_what_cannot_be_done_is_said_before_anything_is_computed(trial, tmp_path, capsys):
    assert main([*trial, "--by", "site"]) == 2
    assert "no column 'site'; the columns are name, sex, age" in capsys.readouterr().err
    assert main([*trial, "--corruptions"]) == 2
    assert "--corruptions" in capsys.readouterr().err
    assert main([*trial, "--cuts", "age=40"]) == 2
    assert "no effect unless columns are named (--by COLUMNS)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*trial, "--cuts", "age"])


@pytest.mark.slow
def test_a_report_and_a_page_on_drift(trial, tmp_path, capsys):
    pytest.importorskip("captum")
    _, _, model, _, data, _ = trial
    words = ["--by", "sex", "--explain", "0", "--resamples", "20", "--no-pdf", "--quiet"]
    assert main(["report", model, data, "--out", str(tmp_path / "report"), *words]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    out = ["--out", str(tmp_path / "drift"), "--no-pdf", "--quiet"]
    assert main(["drift", model, f"{data}/test", *out]) == 0
    assert "24 images." in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "drift").iterdir()} == {"drift.html", "drift.json"}
    assert main(["drift", model, data, data, "--labelled"]) == 2
    assert "single folder" in capsys.readouterr().err
