"""Messages of the command: advice that can be followed there, foreign errors in plain words, nothing that cannot be
printed or breaks a reader of JSON or CSV."""

import argparse
import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import medmamba
from medmamba.cli import messages as cli_messages
from medmamba.cli.main import main
from medmamba.evaluation import evaluate_model
from medmamba.explain import explain
from medmamba.inference.predict import NotFinite, NotFiniteError, iter_predict
from medmamba.utils.advice import as_option, spelled
from medmamba.utils.tables import csv_cell
from medmamba.utils.text import for_stream, json_text, printable

ROOT = Path(__file__).resolve().parents[2]


def picture(seed=0, side=40):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def model_dir(tiny_model, tmp_path):
    tiny_model.config.id2label = {0: "benign", 1: "malignant", 2: "normal"}
    return str(tiny_model.save_pretrained(tmp_path / "model"))


@pytest.fixture
def image(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "medmamba", *map(str, arguments)], cwd=ROOT, capture_output=True, **options
    )


# --- advice ---


def test_settings_are_spelt_as_options():
    settings = {
        "frame": as_option("--frame", "N"),
        "window": as_option("--window", "CENTER,WIDTH"),
        "split": as_option("--split", "A,B,C"),
        "restart": as_option("--restart"),
        "dataset": as_option("--dataset", "NAME"),
        "classes": as_option("--classes", "NAME"),
    }
    for text, expected in {
        "choose one with frame=0 ... frame=11": "choose one with --frame 0 ... --frame 11",
        "pass window=(40, 400)": "pass --window 40,400",
        "pass window=(-600, 1500.5).": "pass --window=-600,1500.5.",
        "window=(center, width) sets it": "--window CENTER,WIDTH sets it",
        "splits be made: split=(0.7, 0.1, 0.2) (--split 0.7,0.1,0.2)": "splits be made: --split 0.7,0.1,0.2",
        "again with restart=True (--restart)": "again with --restart",
        "name the dataset (dataset=...)": "name the dataset (--dataset NAME)",
        "give classes= or dataset=": "give --classes NAME or --dataset NAME",
        'dataset="a b"': "dataset 'a b'",
        "scans/frame=2.png: broken": "scans/frame=2.png: broken",
        "other=3, x == frame": "other=3, x == frame",
        "numpy.load(frame=1)": "numpy.load(--frame 1)",
    }.items():
        assert spelled(text, settings) == expected.replace("dataset 'a", "--dataset 'a")


def multi(tmp_path):
    frames = [Image.fromarray(picture(seed)) for seed in range(3)]
    frames[0].save(tmp_path / "multi.tif", save_all=True, append_images=frames[1:])
    return tmp_path / "multi.tif"


def test_the_frame_that_is_asked_for_can_be_given(model_dir, tmp_path, capsys):
    path = multi(tmp_path)
    assert main(["predict", str(path), "--model", model_dir, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "choose one with --frame 0 ... --frame 2" in error and "frame=" not in error.replace(str(path), "")
    model = medmamba.MedMamba.from_pretrained(model_dir)
    for frame in range(3):
        command = ["predict", str(path), "--model", model_dir, "--device", "cpu", "--json", "--frame", str(frame)]
        assert main(command) == 0
        found = strict(capsys.readouterr().out)
        assert found["logits"] == pytest.approx(model.predict(picture(frame)).logits, abs=1e-5)
        assert model.predict(path, frame=frame).logits == found["logits"]
    with pytest.raises(medmamba.ImageError, match="frame=0"):
        model.predict(path)


def test_the_window_that_is_asked_for_can_be_given(model_dir, tmp_path, capsys):
    grey = (np.arange(1600).reshape(40, 40) % 900 + 1000).astype(np.int32)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    command = ["predict", str(tmp_path / "grey.tif"), "--model", model_dir, "--device", "cpu", "--json"]
    assert main(command) == 1
    assert "--window" in strict(capsys.readouterr().out)["error"]
    found = []
    for window in (["--window", "1450,900"], ["--window=1450,900"], ["--window", "-1e3,5000"]):
        assert main([*command, *window]) == 0
        found.append(strict(capsys.readouterr().out)["logits"])
    assert found[0] == found[1] != found[2]
    model = medmamba.MedMamba.from_pretrained(model_dir)
    assert found[2] == model.predict(tmp_path / "grey.tif", window=(-1000, 5000)).logits
    for wrong in ("40", "a,b", "1,2,3"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--window", wrong])


def test_explain_takes_frame_and_window(model_dir, tmp_path, capsys, monkeypatch):
    pytest.importorskip("captum")
    path, out = multi(tmp_path), tmp_path / "map.json"
    command = ["explain", str(path), "--model", model_dir, "--device", "cpu", "--method", "saliency", "--out", str(out)]
    assert main(command) == 2
    assert "--frame 0 ... --frame 2" in capsys.readouterr().err
    assert main([*command, "--frame", "1"]) == 0
    logit = medmamba.MedMamba.from_pretrained(model_dir).predict(picture(1)).logits
    assert strict(out.read_text(encoding="utf-8"))["logit"] == pytest.approx(max(logit), abs=1e-4)
    with pytest.raises(medmamba.ImageError, match="already decoded"):
        explain(medmamba.MedMamba.from_pretrained(model_dir), medmamba.load_image(picture()), frame=0)


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["--scan", "--layer", "stage1"], "--layer"),
        (["--scan", "--seed", "3"], "--seed"),
        (["--compare", "saliency,gradcam", "--layer", "stage1"], "--layer"),
        (["--method", "saliency", "--stage", "2"], "--stage"),
    ],
)
def test_options_without_effect_are_refused(arguments, idle, model_dir, image, capsys):
    assert main(["explain", str(image), "--model", model_dir, "--device", "cpu", *arguments]) == 2
    assert f"{idle} would have no effect" in capsys.readouterr().err
    assert main(["predict", str(image), "--model", model_dir, "--csv", "--top-k", "2"]) == 2
    assert "--top-k has no effect" in capsys.readouterr().err


def folders(root, names, count=3):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.fromarray(picture(10 * i + j)).save(root / name / f"{j}.png")
    return root


def test_evaluate_takes_one_class_folder_and_classes(model_dir, tmp_path, capsys):
    pytest.importorskip("accelerate")
    data = folders(tmp_path / "data", ["benign"])
    command = ["evaluate", "--model", model_dir, "--data", str(data), "--split", "all", "--device", "cpu", "--quiet"]
    for classes in ([], ["--classes", "benign", "malignant", "normal"]):
        assert main([*command, "--resamples", "0", *classes]) == 0
        assert "3 images" in capsys.readouterr().out
    assert main([*command, "--classes", "good", "bad"]) == 2
    error = capsys.readouterr().err
    assert "--classes" in error and "classes=" not in error


# --- what is not a number ---


@pytest.fixture(params=[torch.nan, 3e38], ids=["nan", "overflow"])
def broken(model_dir, request):
    """Weights that are NaN, as a diverged training leaves them, or so large that what follows overflows."""
    path = Path(model_dir, "model.safetensors")
    tensors = load_file(path)
    tensors["patch_embed.norm.weight"] = tensors["patch_embed.norm.weight"].float() * request.param
    save_file(tensors, path, {"format": "pt"})
    config = json.loads(Path(model_dir, "config.json").read_text(encoding="utf-8"))
    config.pop("weights_sha256", None)
    Path(model_dir, "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model_dir


@pytest.mark.parametrize(
    "form", [[], *(pytest.param([option], marks=pytest.mark.slow) for option in ("--json", "--csv"))], ids=" ".join
)
def test_a_model_of_nan_gives_no_answer(broken, image, form, capsys):
    assert main(["predict", str(image), "--model", broken, "--device", "cpu", *form]) in (1, 2)
    captured = capsys.readouterr()
    assert "nan%" not in captured.out + captured.err
    assert any(word in captured.out + captured.err for word in ("NaN", "infinite", "not finite"))
    if form == ["--json"] and captured.out:
        assert "label" not in strict(captured.out)


def test_infinite_weights_are_named(tiny_model):
    with torch.no_grad():
        tiny_model.stages[1].blocks[0].conv[1].bias[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"stages\.1\.blocks\.0\.conv\.1\.bias"):
        tiny_model.predict(picture())
    with pytest.raises(NotFiniteError, match="not finite"):
        explain(tiny_model, picture(), "saliency")


def test_one_image_that_overflows_does_not_end_a_batch(tiny_model):
    tiny_model.head.register_forward_hook(
        lambda module, args, output: torch.where(torch.arange(len(output))[:, None] == 1, torch.nan, output)
    )
    found = list(iter_predict(tiny_model, [picture(i) for i in range(3)]))
    assert [isinstance(r, NotFinite) for r in found] == [False, True, False]
    assert "overflowed in float32" in found[1].error


def test_evaluation_says_how_many_images_got_no_answer(tiny_model, tmp_path):
    pytest.importorskip("accelerate")
    tiny_model.config.id2label = {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        tiny_model.head.weight.fill_(torch.nan)
    data = folders(tmp_path / "data", ["a", "b"])
    with pytest.raises(NotFiniteError, match=r"no prediction for 6 of 6 images.*head\.weight"):
        evaluate_model(tiny_model, data, None, device="cpu", resamples=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_has_no_nan():
    record = {"a": float("nan"), "b": [float("inf"), 1.5, ("x", -float("inf"))], "c": np.float64("nan")}
    assert strict(json_text(record)) == {"a": None, "b": [None, 1.5, ["x", None]], "c": None}


# --- names that cannot be printed, and cells that are formulas ---


def test_text_is_printable():
    for text in ("\x1b[31mred", "a\nb", "a\x9bb", "\udcff.png", "\u202egnp.exe", "a\x00b", "\u2028", "tab\there"):
        shown = printable(text)
        assert shown.isprintable() and shown.encode() and len(shown) > len(text)
        assert strict(json_text([text])) == [text] and json_text([text]).isprintable()
    assert printable("Größe 3 µm ｶﾅ 😀") == "Größe 3 µm ｶﾅ 😀"
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert for_stream("µ\nx", ascii_stream) == "\\xb5\nx"


def test_formulas_become_text():
    for text in ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "\n=1", "＝1", "－1"):
        assert csv_cell(text).startswith("'") and csv_cell(text)[1:] == printable(text)
    assert csv_cell("a=1") == "a=1" and csv_cell(-1.5) == -1.5 and csv_cell("") == ""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    "form", [[], *(pytest.param([option], marks=pytest.mark.slow) for option in ("--json", "--csv"))], ids=" ".join
)
def test_names_that_cannot_be_printed_do_not_end_a_batch(model_dir, tmp_path, form):
    folder = tmp_path / "images"
    folder.mkdir()
    content = io.BytesIO()
    Image.fromarray(picture()).save(content, "png")
    names = [b"\xff\xfe.png", b"\x1b[2J.png", b"=cmd().png", b"new\nline.png", "\u202egnp.png".encode(), b"z.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content.getvalue())
    Path(os.fsdecode(os.fsencode(folder) + b"/\x1b]bad.png")).write_bytes(b"broken")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"} if not form else {**os.environ, "PYTHONUTF8": "1"}
    os.chdir(ROOT)
    result = run("predict", folder, "--model", model_dir, "--device", "cpu", *form, env=environment, timeout=240)
    out, err = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == 1, err
    assert not any(c in out + err for c in "\x1b\x9b\u202e") and "Traceback" not in err
    lines = out.splitlines()
    if form == ["--json"]:
        found = [strict(line)["source"] for line in lines]
        assert {os.fsencode(name)[-len(b"\xff\xfe.png") :] for name in found} >= {b"\xff\xfe.png"}
        assert len(found) == len(names) + 1
    elif form == ["--csv"]:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert len(rows) == len(names) + 1 and sum(bool(row["error"]) for row in rows) == 1
    else:
        assert len(lines) == len(names)


def test_labels_that_are_formulas(tiny_model, image, tmp_path, capsys):
    tiny_model.config.id2label = {0: "=HYPERLINK(1)", 1: "+x", 2: "-"}
    folder = str(tiny_model.save_pretrained(tmp_path / "odd"))
    assert main(["predict", str(image), "--model", folder, "--device", "cpu", "--csv"]) == 0
    header, row = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header[3:6] == ["'=HYPERLINK(1)", "'+x", "'-"] and row[1] in header[3:6]


# --- foreign errors ---


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    made.add_argument("--batch-size")
    made.add_argument("--device")
    return made


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB.*--batch-size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (MemoryError(), "not enough memory: lower --batch-size"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), "^out/x: no space left on device; make room"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1 vs 2"), "no space left"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), "^/root/x: permission denied; .*HF_HOME"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/ro/x"), "nothing can be written there"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gone"), "^gone: no such file or directory"),
        (ModuleNotFoundError("No module named 'accelerate'", name="accelerate"), r'pip install "medmamba\[train\]"'),
        (ValueError("window=(1, 2) is x"), r"^window=\(1, 2\) is x$"),
        (KeyError("oops"), "unexpected error, KeyError.*--debug"),
    ],
)
def test_errors_of_others_in_plain_words(error, says, parser):
    import re

    text = cli_messages.message(error, parser)
    assert re.search(says, text) and "\n" not in text


def test_debug_shows_the_traceback(image, capsys):
    for arguments in (["--debug", "predict", "absent.png"], ["predict", "absent.png", "--debug"]):
        assert main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err
    assert main(["predict", "absent.png"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_stop_by_the_keyboard_is_said(monkeypatch, capsys):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("medmamba.cli.doctor.run", stopped)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "medmamba doctor: interrupted\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize(
    ("argument", "unbuffered"), [("doctor", ""), pytest.param("doctor", "1", marks=pytest.mark.slow), ("--help", "")]
)
def test_a_reader_that_has_gone_is_no_error(argument, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "medmamba", argument]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(
        command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=240, check=False
    )
    os.close(write)
    assert result.returncode == 141 and result.stderr == b""


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("accelerate", lambda model, folder: evaluate_model(model, folder, None)),
        ("matplotlib", lambda model, folder: evaluate_model(model, folder, None, out=folder)),
        ("captum", lambda model, folder: explain(model, picture(), "saliency")),
        ("onnx", lambda model, folder: medmamba.export.to_onnx(model, folder / "m.onnx")),
    ],
)
def test_a_missing_package_names_its_extra(module, call, tiny_model, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}: pip install "medmamba\[(train|explain|export)\]"'):
        call(tiny_model, tmp_path)


@pytest.mark.slow
def test_export_is_there_after_import_medmamba():
    code = "import medmamba, sys; assert 'onnx' not in sys.modules; print(medmamba.export.to_onnx.__name__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "to_onnx"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medmamba.nothing


@pytest.mark.slow
def test_the_exporter_of_pytorch_points_to_the_one_here(tiny_model, tmp_path, recwarn):
    pytest.importorskip("onnxscript")
    for options in ({}, {"dynamo": False}):
        with pytest.raises(RuntimeError, match=r"medmamba\.export\.to_onnx"):
            torch.onnx.export(tiny_model, (torch.zeros(1, 3, 32, 32),), str(tmp_path / "x.onnx"), **options)
