"""Exported models against PyTorch, in onnxruntime and as torch.export programs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.cli.main import main
from medmamba.export import ExportError, load_torch_export, onnx_session, scan_library, to_onnx, to_torch_export
from medmamba.export import check as check_module
from medmamba.inference.predict import predict_logits
from medmamba.kernels import reference
from medmamba.kernels.backends import cpu as native

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'medmamba[export]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'medmamba[export]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'medmamba[export]'")

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
LABELS = {0: "naïve", 1: "plasma cell", 2: "other"}

needs_library = pytest.mark.skipif(native.BACKEND.why_not() is not None, reason="no scan library for this platform")
WAYS = [pytest.param(False, id="operators"), pytest.param(True, id="library", marks=needs_library)]


def create(name: str, size: int, seed: int = 0, **config) -> medmamba.MedMamba:
    """A model whose outputs depend on the image, as a trained one's do, and whose batch norms are not identities."""
    torch.manual_seed(seed)
    model = medmamba.create_model(
        name, num_classes=3, id2label=LABELS, preprocess=dict(input_size=(size, size)), **config
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        model.head.weight.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def model(pictures):
    """It sorts the pictures into all three classes."""
    model = create("test", 32)
    logits = torch.tensor([prediction.logits for prediction in model.predict(pictures)])
    with torch.no_grad():
        model.head.bias -= logits.median(0).values
    model.config = model.config.replace(calibration={"temperature": 1.7})
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return path, to_onnx(model, path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Photographs of nothing, 60 of them, of three sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i in range(60):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(coarse).resize(((40, 50), (64, 48), (33, 33))[i % 3], Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def logits_of(session, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@pytest.mark.parametrize("library", WAYS)
def test_onnx_gives_the_outputs_of_pytorch(model, exported, library):
    session = onnx_session(exported[0], threads=1, library=library)
    for shape in ((1, 3, 32, 32), (3, 3, 32, 32), (1, 3, 33, 47), (3, 3, 64, 40), (2, 3, 45, 97)):
        images = torch.randn(shape)
        torch.testing.assert_close(logits_of(session, images), predict_logits(model, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("library", WAYS)
def test_nano(tmp_path_factory, library):
    model = create("nano", 64)
    path = tmp_path_factory.mktemp("nano") / "nano.onnx"
    report = to_onnx(model, path)
    assert report.max_difference < 1e-4
    session = onnx_session(path, threads=1, library=library)
    for shape in ((1, 3, 64, 64), (3, 3, 71, 53)):
        images = torch.randn(shape)
        torch.testing.assert_close(logits_of(session, images), predict_logits(model, images), atol=1e-4, rtol=0)


def test_channels_and_features(tmp_path):
    model = medmamba.create_model("test", num_classes=0, in_chans=1).eval()
    assert to_onnx(model, tmp_path / "features.onnx").shapes[0] == (1, 1, 32, 32)
    session = onnx_session(tmp_path / "features.onnx", threads=1)
    (output,) = session.get_outputs()
    assert output.name == "features" and output.shape == ["batch", 64]


def scan_session(library: bool):
    """A model that is one scan."""
    from onnx import TensorProto, helper

    from medmamba.export.onnx_graph import IR_VERSION
    from medmamba.export.onnx_scan import DOMAIN, OPSET, Scan2D

    ranks = dict(x=4, proj=5, dt_weight=3, dt_bias=2, A=3, D=2)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([helper.make_node("Scan2D", list(ranks), ["y"], domain=DOMAIN)], "scan", inputs, [output])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [Scan2D.to_function_proto()]
    proto = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(proto)
    return onnx_session(proto.SerializeToString(), threads=1, library=library)


def scan_inputs(B: int, H: int, W: int, C: int = 6, N: int = 16, R: int = 2, scale: float = 1.0) -> dict:
    """`scale` is that of the step sizes: at 1 as in a new model, at 1000 far beyond what exp can take in float32."""
    generator = torch.Generator().manual_seed(B * H * W)
    rand = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    proj = rand(B, H, W, 4, R + 2 * N)
    proj[..., :R] *= scale
    A = -torch.arange(1, N + 1).float() * torch.exp(0.3 * rand(4, C, N))
    return dict(x=rand(B, H, W, C), proj=proj, dt_weight=rand(4, C, R), dt_bias=rand(4, C) - 4, A=A, D=rand(4, C))


@pytest.mark.parametrize("library", WAYS)
def test_scan_for_any_size_and_step(library):
    session = scan_session(library)
    for size in ((1, 1, 1), (1, 1, 9), (2, 7, 5), (3, 8, 8), (1, 16, 3)):
        for scale in (1, 10, 1000):
            inputs = scan_inputs(*size, scale=scale)
            expected = reference.scan_2d(*(t.double() for t in inputs.values()))
            y = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])
            largest = float(expected.abs().max())
            assert float((y.double() - expected).abs().max()) < 1e-5 * largest, (size, scale)


@needs_library
def test_library_refuses_shapes_that_do_not_fit():
    session = scan_session(library=True)
    inputs = {name: t.numpy() for name, t in scan_inputs(1, 4, 4).items()}
    with pytest.raises(Exception, match="shapes of its inputs do not fit"):
        session.run(None, {**inputs, "D": inputs["D"][:, :-1]})


@needs_library
def test_library_outlives_its_sessions(model, exported):
    images = torch.randn(2, 3, 64, 64)
    expected = predict_logits(model, images)
    for threads in (1, 2, 3):
        session = onnx_session(exported[0], threads, library=True)
        torch.testing.assert_close(logits_of(session, images), expected, atol=1e-4, rtol=0)
        del session
    assert scan_library().is_file()


def test_file_says_what_it_is(model, exported):
    path, report = exported
    about = onnx_session(path, threads=1).get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == list(LABELS.values())
    assert json.loads(about["preprocess"])["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(about["calibration"]) == {"temperature": 1.7}
    assert about["medmamba_version"] == medmamba.__version__ and about["task"] == "multiclass"
    assert report.bytes == path.stat().st_size
    assert {shape[0] for shape in report.shapes} == {1, 2, 3} and len({shape[2:] for shape in report.shapes}) == 3


def test_script_of_the_docs(model, exported, pictures):
    """It runs where neither torch nor medmamba can be imported, and says what `predict` says."""
    (script,) = (c for c in re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.S) if "sys.argv" in c)
    blocked = 'import sys; sys.modules["torch"] = sys.modules["medmamba"] = None\n'
    output = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", blocked + script, exported[0], pictures[1]],
        capture_output=True,
        encoding="utf-8",
    )
    assert output.returncode == 0, output.stderr
    found = {label: float(p) for label, p in (line.split(": ") for line in output.stdout.splitlines())}
    expected = dict(model.predict(pictures[1]).top)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=0.01)


@pytest.fixture(scope="module")
def test_set(model, pictures, tmp_path_factory) -> Path:
    """The pictures sorted by what the model takes them for, so that it is always right."""
    folder = tmp_path_factory.mktemp("labelled")
    for path, prediction in zip(pictures, model.predict(pictures), strict=True):
        (folder / prediction.label).mkdir(exist_ok=True)
        (folder / prediction.label / path.name).write_bytes(path.read_bytes())
    assert {child.name for child in folder.iterdir()} == set(LABELS.values())
    return folder


def test_half_precision_weights(model, test_set, tmp_path, monkeypatch):
    # Untrained, the model decides by hairs; that half a point is the limit is the test after the next.
    monkeypatch.setattr(check_module, "MAX_ACCURACY_LOSS", 15)
    report = to_onnx(model, tmp_path / "half.onnx", precision="fp16", check_data=test_set)
    assert report.accuracy_pytorch == 100 and report.accuracy >= 85 and report.images == 60
    proto = onnx.load(tmp_path / "half.onnx")
    types = {t.name: t.data_type for t in proto.graph.initializer}
    assert types["head.weight.half"] == onnx.TensorProto.FLOAT16
    assert all(
        kind == onnx.TensorProto.FLOAT for name, kind in types.items() if name.endswith((".A", ".D", "dt_weight"))
    )


def test_int8(model, test_set, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_ACCURACY_LOSS", 60)
    report = to_onnx(
        model, tmp_path / "int8.onnx", precision="int8", images=pictures[:20], check_data=test_set, check_limit=30
    )
    assert report.images == 30 and report.accuracy > 40
    proto = onnx.load(tmp_path / "int8.onnx")
    assert onnx.TensorProto.INT8 in {t.data_type for t in proto.graph.initializer}
    assert "Scan2D" in {node.op_type for node in proto.graph.node}


def test_precision_that_costs_accuracy_is_refused(model, test_set, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_ACCURACY_LOSS", -0.1)
    with pytest.raises(ExportError, match=r"fp16 costs too much: accuracy falls from 100.00 % .* on 7 images"):
        to_onnx(model, tmp_path / "half.onnx", precision="fp16", check_data=test_set, check_limit=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(precision="int4"), "unknown precision 'int4'; choose one of: fp32, fp16, int8"),
        (dict(precision="fp16"), "give check_data, labelled images"),
        (dict(precision="int8", check_data="x"), "give a few dozen as `images`"),
        (dict(precision="fp16", check_data="x", check_limit=0), "at least 1, got 0"),
    ],
)
def test_what_is_missing_is_named(model, tmp_path, arguments, message):
    with pytest.raises(ExportError, match=message):
        to_onnx(model, tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(model, tmp_path):
    with pytest.raises(ExportError, match="there is no folder"):
        to_onnx(model, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ExportError, match="is a folder; name a file in it"):
        to_onnx(model, tmp_path)
    with pytest.raises(ExportError, match=r"ends in \.pt2"):
        to_torch_export(model, tmp_path / "model.onnx")


def test_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'needs onnx: pip install "medmamba\[export\]"'):
        to_onnx(model, tmp_path / "model.onnx")


def test_wrong_file_is_not_left_behind(model, tmp_path, monkeypatch):
    from medmamba.export import onnx_graph

    right = onnx_graph.build

    def wrong(model):
        model.head.bias.data[1] += 0.01
        proto = right(model)
        model.head.bias.data[1] -= 0.01
        return proto

    monkeypatch.setattr(onnx_graph, "build", wrong)
    (tmp_path / "model.onnx").write_text("what was there before")
    with pytest.raises(ExportError, match=r"differ from PyTorch's by 1.*e-02, more than 1e-04; nothing was written"):
        to_onnx(model, tmp_path / "model.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was there before"]


def test_model_is_not_changed(tmp_path):
    model = create("test", 32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.stages[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    to_onnx(model, tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_torch_export(tmp_path, monkeypatch):
    model = create("test", 32, depths=(1, 1), dims=(8, 16))  # tracing takes its time for every block
    path = tmp_path / "model.pt2"
    model.train().stages[0].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    report = to_torch_export(model, path)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    assert report.max_difference < 1e-4 and path.stat().st_size == report.bytes
    program, config = load_torch_export(path)
    assert config["id2label"]["0"] == "naïve"
    (backend,) = {node.args[6] for node in program.graph.nodes if node.target is torch.ops.medmamba.scan_2d.default}
    assert backend == "auto"
    for shape in ((1, 3, 32, 32), (3, 3, 33, 47), (4, 3, 64, 40)):
        images = torch.randn(shape)
        for name in ("torch", "auto"):
            monkeypatch.setenv("MEDMAMBA_SCAN", name)
            with torch.inference_mode():
                torch.testing.assert_close(program(images), predict_logits(model, images), atol=1e-4, rtol=0)

    from medmamba.export import torch_program

    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: torch.export.load(path))  # it takes long
    monkeypatch.setattr(torch_program, "load_torch_export", lambda path: (lambda images: images.mean((2, 3)), config))
    with pytest.raises(ExportError, match="the exported model is wrong"):
        to_torch_export(model, tmp_path / "wrong.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_command(model, pictures, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    target = tmp_path / "model.onnx"
    arguments = ["export", str(tmp_path / "model"), "--out", str(target)]
    assert main([*arguments, "--to", "onnx", "--images", str(pictures[0].parent)]) == 0
    assert "largest difference from PyTorch" in capsys.readouterr().out
    assert target.is_file()
    assert main([*arguments, "--to", "torch-export", "--precision", "fp16"]) == 2
    assert "are for --to onnx" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--to", "tensorflow"])
    assert "invalid choice: 'tensorflow'" in capsys.readouterr().err
