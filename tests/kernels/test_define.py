"""Operators are defined without PyTorch's compiler, which would double the time to a first prediction."""

import subprocess
import sys

import torch

from medmamba.kernels.define import assume_constant_result, operator

FIRST_PREDICTION = """
import sys, tempfile, torch, medmamba
folder = tempfile.mkdtemp()
medmamba.create_model("test", num_classes=3).eval().save_pretrained(folder)
model = medmamba.MedMamba.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.zeros(1, 3, 32, 32))
assert logits.shape == (1, 3)
print(sorted(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""


def test_loading_and_a_prediction_do_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", FIRST_PREDICTION], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_constant_results_are_marked_as_pytorch_marks_them():
    def ours():
        return 1

    def pytorchs():
        return 1

    assume_constant_result(ours), torch.compiler.assume_constant_result(pytorchs)
    assert vars(ours) == vars(pytorchs) != {}


def test_kernels_are_not_compiled():
    seen = []

    @operator("medmamba_test::twice")
    def twice(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return 2 * x

    torch.library.register_fake("medmamba_test::twice")(lambda x: torch.empty_like(x))
    found = torch.compile(lambda x: torch.ops.medmamba_test.twice(x) + 1, backend="eager", fullgraph=True)(
        torch.ones(2)
    )
    assert found.tolist() == [3, 3] and seen == [False]
    torch.library.opcheck(torch.ops.medmamba_test.twice.default, (torch.ones(2),))
