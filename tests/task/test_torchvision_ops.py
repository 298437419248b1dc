"""The declared operators: only where they are missing, and once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from task.torchvision_ops import declare_missing_torchvision_ops


def test_timm_imports_after_the_declaration_and_a_second_one_does_nothing():
    code = (
        "from task.torchvision_ops import declare_missing_torchvision_ops as declare\n"
        "first = declare()\n"
        "import timm, torch, gc\n"
        "gc.collect()\n"
        "assert declare() == ()\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
        "assert (first == ()) == (torch.version.cuda is not None)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_declared_beside_a_cuda_build(monkeypatch):
    def refuse(*_args):
        raise RuntimeError("nothing may be declared")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.library, "Library", refuse)
    assert declare_missing_torchvision_ops() == ()


def test_importing_the_model_module_is_enough_for_peft():
    code = "import task.model, peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_declared_operators_have_no_kernel():
    declare_missing_torchvision_ops()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
