"""Distillation: a teacher's probabilities as targets, in training and in the identity of a run."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medmamba import create_model
from medmamba.training import RecipeError, ResumeError, train
from medmamba.training.teacher import MedMambaTeacher, load_teacher

OPTIONS = dict(epochs=1, batch_size=8, size=32, device="cpu", precision="fp32", progress=False, check_duplicates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    root / split / label / f"{i}.png"
                )
    return root


class Stubborn(nn.Module):
    """Says the second class, whatever it sees, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.bias, self.seen = nn.Parameter(torch.tensor([-9.0, 9.0])), []

    def forward(self, images):
        self.seen.append(images)
        return self.bias.softmax(0).expand(len(images), 2)


def test_a_student_learns_what_its_teacher_says(folder, tmp_path):
    teacher = Stubborn()
    settings = OPTIONS | dict(epochs=3, lr=5e-3, distill=1.0, ema=0.0, label_smoothing=0.0, warmup_epochs=0)
    result = train(folder, tmp_path / "told", "default", "test", teacher=teacher, **settings)
    model = result.load()
    answers = [model.predict(np.full((32, 32, 3), grey, np.uint8)).label for grey in (20, 120, 220)]
    assert answers == ["b"] * 3
    assert all(x.min() >= 0 and x.max() <= 1 and x.shape[1:] == (3, 32, 32) for x in teacher.seen)
    assert not teacher.training and not teacher.bias.requires_grad


def test_teacher_and_weight_go_together(folder, tmp_path):
    with pytest.raises(RecipeError, match="both a teacher and the setting distill"):
        train(folder, tmp_path / "a", "default", "test", teacher=Stubborn(), **OPTIONS)
    with pytest.raises(RecipeError, match="both a teacher and the setting distill"):
        train(folder, tmp_path / "b", "default", "test", distill=0.5, **OPTIONS)


def test_another_teacher_is_another_run(folder, tmp_path):
    options = OPTIONS | dict(distill=0.5, epochs=2)
    stopped = train(folder, tmp_path / "run", "default", "test", teacher=Stubborn(), max_seconds=0.0, **options)
    assert not stopped.finished
    other = Stubborn()
    other.bias.data += 1
    with pytest.raises(ResumeError, match="teacher"):
        train(folder, tmp_path / "run", "default", "test", teacher=other, **options)


def test_a_medmamba_teaches_only_its_own_classes():
    teacher = create_model("test", num_classes=2, id2label={0: "a", 1: "b"})
    loaded = load_teacher(teacher, teacher.config, torch.device("cpu"))
    assert isinstance(loaded, MedMambaTeacher)
    images = torch.rand(2, 3, 32, 32)
    expected = teacher.eval()((images - 0.5) / 0.5).softmax(-1)
    assert torch.allclose(loaded(images), expected, atol=1e-5)
    with pytest.raises(RecipeError, match="classes in the same order: it has 'a', 'b'"):
        load_teacher(teacher, teacher.config.replace(id2label={0: "b", 1: "a"}), torch.device("cpu"))
