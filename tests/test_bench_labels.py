import json

import pytest
import tiny
import torch

from bench import curves, label_quality


def test_quality_counts_what_is_sure_and_what_is_right():
    label = torch.tensor([[0.9, 0.6, 0.75], [0.1, 0.4, 0.25]])[None, :, None]  # [1, 2, 1, 3]
    quality = label_quality.Quality(["a", "b"])
    quality.update(label, torch.tensor([[[0, 1, 255]]], dtype=torch.uint8))
    summary = quality.summary()
    assert summary["miou"] == 0.25  # a: 1 of 2, b: none of 1
    assert summary["right"] == 0.5
    assert summary["above"]["0.5"] == [1, 0.5]
    assert summary["above"]["0.8"] == [0.5, 1]
    assert summary["above"]["0.95"] == [0, 0]


def test_labels_are_scored_in_training_and_of_a_checkpoint(tmp_path):
    root = tiny.make_set(tmp_path / "set")
    out = tmp_path / "labels.jsonl"
    options = tiny.options(root, tmp_path / "run", {"optim.steps": 2, "run.eval_every": 1})
    assert label_quality.main(["--list", "val.txt", "--out", str(out), *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    kinds = {part + told for part in ("decoder", "sgc", "fused") for told in ("", ", tags", ", excluded")}
    assert kinds <= rows[0].keys()
    assert rows[1]["decoder, excluded"]["right"] >= rows[1]["decoder"]["right"]
    last = tmp_path / "again.jsonl"
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert label_quality.main(["--checkpoint", checkpoint, "--list", "val.txt", "--out", str(last)]) == 0
    scored = json.loads(last.read_text())
    assert scored["decoder"] == rows[1]["decoder"]
    assert scored["fused, tags"] == rows[1]["fused, tags"]


def test_labels_are_drawn_over_the_steps_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    kinds = [part + told for part in ("decoder", "sgc", "fused") for told in ("", ", excluded")]
    rows = [{"step": step, **{kind: {"miou": step / 100} for kind in kinds}} for step in (10, 20)]
    path = tmp_path / "labels.png"
    assert curves.plot_labels(rows, path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
