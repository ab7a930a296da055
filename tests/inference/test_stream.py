"""The stream behind prediction: the same answers however it runs, and a clean end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba import create_model
from medmamba.imaging.ahead import Chunk, Order, Prepared
from medmamba.inference import replay
from medmamba.inference import stream as stream_module
from medmamba.inference.engine import Answer
from medmamba.inference.predict import Failure, iter_predict
from medmamba.inference.stream import Options, _in_flight, _Run, stream


@pytest.fixture
def files(tmp_path):
    for i in range(40):
        array = np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3) if i % 3 else (32, 32), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_text("no image")
    return sorted(tmp_path.iterdir())


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other) and one.source == other.source
        if not isinstance(one, Failure):
            assert one.logits == pytest.approx(other.logits, abs=1e-4) and one.image_notes == other.image_notes


def test_the_answers_do_not_depend_on_the_way(tiny_model, files):
    expected = list(iter_predict(tiny_model, files, workers=0))
    assert sum(isinstance(result, Failure) for result in expected) == 1
    for options in (
        {"workers": 2},
        {"workers": 1, "batch_size": 3},
        {"workers": 0, "batch_size": 64},
        {"workers": 1, "devices": ["cpu", "cpu"], "batch_size": 4},
        {"workers": 0, "precision": "float32"},
    ):
        agree(iter_predict(tiny_model, iter(files), **options), expected)
    rough = list(iter_predict(tiny_model, files, workers=0, precision="bfloat16"))
    good = [result for result in rough if not isinstance(result, Failure)]
    assert len(good) == 39 and all(np.isfinite(result.logits).all() for result in good)


def test_hooks_and_modes_of_the_model_are_respected(tiny_model, files):
    expected = list(iter_predict(tiny_model, files[:5], workers=0))
    seen = []
    handle = tiny_model.patch_embed.register_forward_hook(lambda *_: seen.append(1))
    agree(iter_predict(tiny_model.train(), files[:5], workers=1, batch_size=2), expected)
    handle.remove()
    assert seen and tiny_model.training


def test_weights_that_change_meanwhile_count(tiny_model, files):
    results = iter_predict(tiny_model, [files[0]] * 40, workers=1, batch_size=2)
    first = next(results)
    with torch.no_grad():
        tiny_model.head.bias += 10
    *_, last = results
    assert np.allclose(np.subtract(last.logits, first.logits), 10, atol=1e-3)


def test_features_come_with_the_logits(tiny_model, files):
    order = Order(tiny_model.config.preprocess, tiny_model.config.in_chans)
    for batch in stream(tiny_model, files, order, Options(workers=1)):
        count = sum(logits is not None for _, logits in batch.rows())
        assert batch.answer.features.shape == (count, tiny_model.head.in_features) and len(batch.answer.logits) == count


def test_numbers_out_of_range(tiny_model, files):
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"precision": "float8"}, {"gpu_decode": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
            list(iter_predict(tiny_model, files, **wrong))


def test_reduced_jpeg_is_close_and_noted(tiny_model, tmp_path):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8))
    grey.resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    (whole,) = iter_predict(tiny_model, [tmp_path / "a.jpg"])
    (reduced,) = iter_predict(tiny_model, [tmp_path / "a.jpg"], reduced=True)
    assert any(note.startswith("decoded at ") for note in reduced.image_notes)
    assert reduced.logits != whole.logits and reduced.logits == pytest.approx(whole.logits, abs=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tiny_model, files):
    expected = list(iter_predict(tiny_model, files, workers=0))
    agree(iter_predict(tiny_model.cuda(), files, workers=2), expected)
    agree(iter_predict(tiny_model, files, workers=2, devices=["cuda", "cpu"], batch_size=4), expected)


@pytest.mark.parametrize(("there", "before"), [(True, 1), (False, 9)])
def test_answers_that_are_there_are_passed_on_before_more_is_read(tiny_model, there, before):
    order = Order(tiny_model.config.preprocess, tiny_model.config.in_chans)
    run = _Run(tiny_model, order, Options(batch_size=2), [torch.device("cpu")])
    running = SimpleNamespace(done=there, answer=lambda: Answer(None, torch.zeros(2, 3)))
    gpu = SimpleNamespace(type="cuda")
    run.engines = [SimpleNamespace(device=gpu, transfer=lambda chunk: None, submit=lambda *_: running)]
    taken = []

    def chunks():
        for slot in range(12):
            taken.append(slot)
            yield Chunk([Prepared(f"{slot}", [], np.zeros((1, 1, 1), np.uint8))] * 2, slot=slot)

    batches = run.batches(chunks())
    assert next(batches).items[0].source == "0" and len(taken) == before
    assert [batch.items[0].source for batch in batches] == [f"{i}" for i in range(1, 12)]


@pytest.mark.parametrize("size", [1, 20, 64, 1000, None])
def test_memory_holds_what_is_on_its_way(tiny_model, monkeypatch, size):
    asked = {}

    def read(_sources, _order, **options):
        asked.update(options)
        yield from ()

    monkeypatch.setattr(stream_module, "read_ahead", read)
    order = Order(tiny_model.config.preprocess, tiny_model.config.in_chans)
    assert not list(stream(tiny_model, [], order, Options(batch_size=size, devices=["cuda:0", "cuda:1"])))
    for one in (64, 128, 256) if size is None else (size,):
        chunks = -(-one // asked["chunk"])  # in a batch
        assert asked["ahead"] > (2 * _in_flight(one, order) + 1) * chunks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_two_gpus_answer_in_order_what_one_answers(files, precision):
    model = create_model("nano", num_classes=3, preprocess={"input_size": (64, 64)}).eval().cuda()
    sources = files * 4  # enough for a replay on each
    options = {"precision": precision, "workers": 2, "batch_size": 4}
    one = list(iter_predict(model, sources, devices=["cuda:0"], **options))
    for devices in (["cuda:1"], ["cuda:0", "cuda:1"], ["cuda:1", "cuda:0"]):
        two = list(iter_predict(model, sources, devices=devices, **options))
        assert [Path(result.source).name for result in two] == [path.name for path in sources]
        agree(two, one)
    assert torch.cuda.current_device() == 0


def test_batches_of_one_shape_are_replayed_until_the_network_or_the_shape_changes(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, network, example, seen, maps):
            if network == "too large":
                seen.append(example)
                raise torch.cuda.OutOfMemoryError
            made.append((network, len(example)))

    monkeypatch.setattr(replay, "Replayed", Recorded)
    seen = []
    repeats = replay.Repeats(seen, [])

    def replayed(network, sizes):
        return [repeats.faster(network, torch.zeros(size, 3)) is not network for size in sizes]

    few = replay.WORTH - 1
    assert replayed("a", [4] * few + [3]) == [False] * (few + 1) and not made
    assert replayed("a", [4] * few + [4, 4, 3, 4]) == [False] * few + [True, True, False, True]  # 3: one was unreadable
    assert replayed("a", [5] * few + [5, 4]) == [False] * few + [True, False]
    assert replayed("b", [5] * few + [5]) == [False] * few + [True]
    assert replayed("too large", [5] * 20) == [False] * 20 and not seen
    assert made == [("a", 4), ("a", 5), ("b", 5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_replay_gives_the_answers_of_its_layers(files, precision, monkeypatch):
    model = create_model("nano", num_classes=3, preprocess={"input_size": (64, 64)}).eval().cuda()
    order = Order(model.config.preprocess, model.config.in_chans)
    options = Options(batch_size=4, workers=1, precision=precision, signature=True)
    made = []
    monkeypatch.setattr(
        replay.Replayed, "__call__", lambda self, x, plain=replay.Replayed.__call__: made.append(1) or plain(self, x)
    )

    def answers(change=False):
        found = []
        for i, batch in enumerate(stream(model, [file for file in files if file.name != "07.png"] * 4, order, options)):
            found.append(batch.answer)
            if change and i == 25:
                with torch.no_grad():
                    model.head.bias += 1
        return [torch.cat([getattr(answer, name) for answer in found]) for name in answer_names]

    answer_names = ("logits", "features", "signature")
    fast = answers()
    assert made
    monkeypatch.setattr(replay, "WORTH", 10**9)
    made.clear()
    for name, one, other in zip(answer_names, fast, answers(), strict=True):
        assert torch.equal(one, other), name
    assert not made
    monkeypatch.setattr(replay, "WORTH", 4)
    changed = answers(change=True)[0]
    assert torch.allclose(changed[-4:], fast[0][-4:] + 1, atol=0.02) and torch.equal(changed[:80], fast[0][:80])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT of a process group")
def test_ctrl_c_ends_everything_and_keeps_the_rows(files, tmp_path):
    out = tmp_path / "out" / "r.jsonl"
    code = (
        # A shell starts what runs in the background with the signal ignored, and children inherit that.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, itertools, medmamba.data.sources as s, medmamba.inference.sinks as k\n"
        "from medmamba.inference import to_file\nk.Sink.rows_at_once = 1\n"
        f"class Endless(s.Sources):\n    def __iter__(self): return iter({[str(file) for file in files]!r} * 10**6)\n"
        "s.open_sources = lambda *a, **k: Endless([], None)\n"
        "k.Sink.take = lambda self, name: True\n"
        "from medmamba.cli.main import main\n"
        f"sys.exit(main(['predict', 'x', '--workers', '2', '--out', {str(out)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 150
    while not (out.exists() and out.stat().st_size > 5000) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted" in said
    assert out.read_bytes().endswith(b"\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
