"""Training on an NVIDIA GPU: nothing in a step waits for the device, and every precision learns."""

import pytest
import tiny
import torch

from pseudoseg_fast import train
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.run_state import generator_states
from pseudoseg_fast.trainer import Trainer

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc;square", "images/2.png,disc"])
    return root


VARIANTS = {
    "default": {},
    "bf16, teacher": {"run.precision": "bf16-mixed", "method.ema": 0.9},
    "CutMix of two views": {"method.cutmix": 1.0, "method.strong_views": 2},
    "two passes": {"optim.accumulate": 2},
    "tags": {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "method.exclude_untagged": "true",
        "method.norm": "none",
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_step_waits_for_nothing(root, tmp_path, changes):
    options = tiny.options(root, tmp_path / "run", changes | {"run.accelerator": "cuda"})
    trainer = Trainer(parse_config(options, "", ""), tmp_path / "run")
    loaders = (labeled_loader, unlabeled_loader)
    streams = [iter(load(trainer.config, trainer.data, trainer.network, 0)) for load in loaders]
    batches = [trainer.next_batches(*streams) for _ in range(3)]
    trainer.training_step(batches[0], 1.0)  # the first allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trainer.training_step(batch, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.stepper.watch.check()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_learns_an_easy_set_and_goes_on(root, tmp_path, precision):
    changes = {
        "run.accelerator": "cuda",
        "run.precision": precision,
        "data.crop_size": 48,
        "optim.name": "adamw",
        "optim.lr": 0.005,
        "optim.batch_size": 4,
        "optim.steps": 40,
        "run.checkpoint_every": 10,
    }
    options = tiny.options(root, tmp_path / "run", changes)
    assert train.main(options) == 0
    assert tiny.checkpoint(tmp_path / "run")["best"]["miou"] > 0.5
    assert train.main([*options, "--run.resume=auto"]) == 0


def test_later_passes_are_rehearsed_and_leave_all_as_it_was(root, tmp_path):
    changes = {"run.accelerator": "cuda", "method.start_u": 2, "method.ema": 0.9}
    config = parse_config(tiny.options(root, tmp_path / "run", changes), "", "")
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.rehearses
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    states = generator_states()
    trainer.rehearse()
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(states, generator_states(), strict=True))
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
