import os
import subprocess
import sys
from pathlib import Path

import torch

from pseudoseg_fast import backends, env
from pseudoseg_fast.backends import cpp

ROOT = Path(env.__file__).resolve().parents[1]


class Refusing:
    """A backend that runs one function on the CPU and gives a reason against the others."""

    @staticmethod
    def refusal(function, tensors):
        if function == "predict_labels" and tensors[0].device.type == "cpu":
            return ""
        return f"no kernel for {function}\nsecond line"


def test_report_names_the_backend_of_every_function_and_why(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {"refusing": Refusing, "eager": backends.eager})
    choices = env._choices("cpu")
    assert set(choices) == {
        "consistency_loss",
        "cross_entropy",
        "depthwise_conv2d",
        "dice_loss",
        "fuse_predictions",
        "predict_labels",
        "pseudo_label",
        "refine_cam",
        "soft_cross_entropy",
    }
    assert choices["predict_labels"] == "refusing"
    assert choices["refine_cam"] == "eager\nnot refusing: no kernel for refine_cam"


def test_command_prints_versions_library_and_backends():
    done = subprocess.run(
        [sys.executable, "-m", "pseudoseg_fast.env"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["torch", torch.__version__] in [line[:2] for line in lines]
    assert ["loaded", "yes"] in lines
    assert any(line[:2] == ["instruction", "sets"] and line[-3:-1] == ["in", "use:"] for line in lines)
    assert any(line[:1] == ["consistency_loss"] for line in lines)


def test_failing_build_is_shown_in_full(tmp_path):
    """In a process of its own, since a failed build stays failed as long as its process."""
    folders = {"PSEUDOSEG_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pseudoseg_fast.env"],
        cwd=ROOT,
        env={**os.environ, **folders, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ["PSEUDOSEG_CACHE", folders["PSEUDOSEG_CACHE"]] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert "loaded" in done.stdout
    # Three times about the library, and once for each function that it has kernels for.
    assert done.stdout.count("no C++ compiler on PATH") == 3 + len(cpp.FUNCTIONS)
