"""The Triton kernels without a GPU: run by the interpreter, and compiled for GPUs that are not there."""

import os

import pytest
import side_by_side
import torch
from side_by_side import PYTEST, ROOT, python
from torch._subclasses.fake_tensor import FakeTensorMode

from pseudoseg_fast import backends, functional

triton = pytest.importorskip("triton", reason="needs Triton")


def test_kernels_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, hence processes of their own."""
    files = sorted(ROOT.glob("tests/interpreter/test_*.py"))
    assert files
    side_by_side.run(*(((*PYTEST, path), {"TRITON_INTERPRET": "1"}) for path in files))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_with_few_spills(capability, tmp_path):
    """Registers, spills and shared memory of every kernel; bench/results has the table of all cases."""
    out = tmp_path / "resources.json"
    done = python(
        *("-m", "bench.triton_resources", "--small", "--capability", str(capability), "--out", str(out)),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert out.read_text().count('"kernel"') > 20


def test_registers_that_nothing_has_written_are_found():
    """What ptxas 12.8 made of refine_cam in half precision, with 24 channels and 3 classes, which failed on an H200."""
    from pseudoseg_fast.backends.triton import import_kernels

    import_kernels()
    from pseudoseg_fast.kernels.machine_code import unwritten_reads

    lines = [
        "ULDC.64 UR34, c[0x0][0x208]",
        "@P5 LDG.E.U16 R12, desc[UR34][R28.64]",
        "R2UR UR16, R2",
        "UMOV UR17, 0xc0000010",
        "UIADD3 UR18, UP0, UR18, 0x20, URZ",
        "UISETP.GE.AND UP0, UPT, UR18, URZ, UPT",
        "HGMMA.64x16x16.F32 R56, R28, gdesc[UR16].tnspB, R56",
    ]

    def found(*lines: str) -> list[str]:
        return unwritten_reads("".join(f"        /*{16 * i:04x}*/   {x} ;\n" for i, x in enumerate(lines)))

    assert found(*lines) == [lines[4], lines[6]]  # of UR18 and UR19
    assert found("UIMAD.WIDE UR18, UR16, 0x2, URZ", *lines) == ["UIMAD.WIDE UR18, UR16, 0x2, URZ"]
    assert found(*lines[:4], "ULDC.64 UR18, c[0x0][0x210]", *lines[4:]) == []
    both = "HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT"
    assert found(*lines[2:4], both) == [both]
    assert found(*lines[2:4], "LDCU.64 UR18, c[0x0][0x210]", both) == []


def test_compiled_kernels_are_for_cuda_tensors():
    """Triton would fail on a CPU tensor with a message about drivers."""
    x = torch.zeros(1, 4, 8)
    with pytest.raises(
        RuntimeError, match="'triton' cannot run refine_cam: it needs CUDA tensors, got one on cpu"
    ):
        functional.refine_cam(x, x, x, backend="triton")
    assert backends.choose("refine_cam", (x, x, x)) is not backends.triton.refine_cam


def test_what_was_measured_to_be_slower_is_left_to_pytorch(monkeypatch):
    """Attention of float32 rows, but not where the scores of an image grow large, nor of other dtypes."""
    monkeypatch.setattr(backends.triton, "refusal", lambda function, tensors: "")
    with FakeTensorMode():
        small, large = (torch.zeros(1, length, 128, device="cuda") for length in (1089, 4225))
    assert backends.choose("refine_cam", (small, small, small)) is backends.eager.refine_cam
    for function, rows in (("refine_cam", large), ("refine_cam", small.half()), ("pseudo_label", small)):
        assert backends.choose(function, (rows, rows, rows)) is getattr(backends.triton, function)
    assert "1089 positions" in backends.objection("triton", "refine_cam", (small, small, small))


def test_work_on_the_cpu_loads_no_kernels():
    """Nor Triton with them; torch may import that on its own account."""
    code = (
        "import sys, torch; from pseudoseg_fast import functional as f; x = torch.zeros(1, 4, 8)\n"
        "f.refine_cam(x, x, x); print('pseudoseg_fast.kernels' in sys.modules)"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_without_triton_the_reason_is_given(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = (
        "import torch; from pseudoseg_fast import functional as f; x = torch.zeros(1, 1, 2, 2)\n"
        "f.fuse_predictions(x, x)\n"
        "try: f.fuse_predictions(x, x, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    done = python("-c", code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), TRITON_INTERPRET="1")
    assert "Triton cannot be imported (no triton here)" in done.stdout, done.stdout + done.stderr


def test_the_search_times_further_sizes_of_fast_configurations_and_of_the_table(monkeypatch):
    from bench import attention_configs
    from bench.attention_configs import TABLES, candidates, time_all

    rows = [
        {"part": "forward", "dtype": "mixed", "right": True, **config._asdict()}
        for config in candidates("mixed")
    ]
    table = TABLES["forward"][2, 4, 128]
    assert table in list(candidates("mixed"))
    rows[0]["right"] = False

    def milliseconds(row, size):
        return size[1] * (1.0 if row["warps"] == 8 and row["rows"] == 32 else 2.0)

    monkeypatch.setattr(attention_configs, "launch_milliseconds", milliseconds)
    monkeypatch.setattr(attention_configs, "case", lambda *_: type("", (), {"key_of_tables": (2, 4, 128)}))
    time_all(rows, [(1, 10, 3), (1, 20, 3)])
    assert "ms" not in rows[0]
    further = [row for row in rows if len(row.get("ms", ())) == 2]
    fast = [row for row in further if row["ms"] == [10, 20]]
    assert all(row["warps"] == 8 and row["rows"] == 32 for row in fast)
    assert len(fast) == 9
    assert [row["ms"] for row in further if row not in fast] == [[20, 40]]
