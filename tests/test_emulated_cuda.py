"""The GPU's tests without a GPU (tests/emulated_cuda). All of them so: `pytest -m full tests/test_emulated_cuda.py`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
              pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA itself")]
QUICK = "(no-compile or fp16 and training_on or padded or digest) and not (shards_train and 1)"


@pytest.mark.parametrize("which", [["-k", QUICK], pytest.param([], marks=pytest.mark.full)], ids=["quick", "all"])
@pytest.mark.timeout(2400)
def test_what_needs_a_gpu_passes_on_emulated_ones(tmp_path, which):
    env = environment(EMULATE_CUDA="4", PYTHONPATH="tests/emulated_cuda")  # as its docstring has it
    run = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--basetemp",
                          tmp_path / "tests", "tests/test_gpu.py", *which], cwd=ROOT, env=env, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout


def test_a_tensor_of_the_cpu_and_one_of_the_gpu_do_not_mix(tmp_path):
    """The emulation is of use only if it refuses what a GPU refuses."""
    code = "import torch; x = torch.ones(3, device='cuda:1'); print((x * 2).sum().item(), x.device); x + torch.ones(3)"
    env = os.environ | dict(EMULATE_CUDA="2", PYTHONPATH=str(ROOT / "tests" / "emulated_cuda"))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert run.returncode == 1 and "6.0 cuda:1" in run.stdout and "on the same device" in run.stderr, run.stderr
