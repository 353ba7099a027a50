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
    "three passes": {"optim.accumulate": 3},
    "tags": {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "method.exclude_untagged": "true",
        "method.norm": "none",
    },
}


def prepare(root, folder, changes):
    """Return a trainer, without dropout, and the batches of six steps."""
    options = {"run.accelerator": "cuda", "optim.steps": 6}
    trainer = Trainer(parse_config(tiny.options(root, folder, changes | options), "", ""), folder)
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loaders = (labeled_loader, unlabeled_loader)
    streams = [iter(load(trainer.config, trainer.data, trainer.network, 0)) for load in loaders]
    return trainer, [trainer.next_batches(*streams) for _ in range(6)]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_step_waits_for_nothing(root, tmp_path, changes, recorded):
    trainer, batches = prepare(root, tmp_path / "run", changes | {"run.cuda_graphs": recorded})
    trainer.training_step(batches[0], 1.0)  # the first allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trainer.training_step(batch, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.stepper.watch.check()
    assert not recorded or trainer.stepper.graphs.replay is not None


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_recorded_pass_has_the_losses_and_gradients_of_a_launched_one(root, tmp_path, changes):
    """At the same weights; after a few steps of so small a network, rounding alone makes a difference of per cents."""
    trainer, batches = prepare(root, tmp_path / "run", changes | {"run.cuda_graphs": True})
    stepper = trainer.stepper
    for trainer.step, batch in enumerate(batches[:-1]):
        trainer.training_step(batch, 0.2 * trainer.step)
    passes = stepper.graphs
    assert passes.replay is not None
    seen = []
    buffers = [buffer.clone() for buffer in trainer.network.buffers()]
    for make in (passes, None):
        torch.manual_seed(2)  # CutMix
        stepper.graphs = make
        losses, _ = stepper._accumulate(batches[-1], 0.7)
        gradient = [weight.grad.clone() for weight in trainer.network.parameters() if weight.grad is not None]
        seen.append((losses, gradient))
        for buffer, before in zip(trainer.network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    (ours, recorded), (theirs, launched) = seen
    half = "bf16" in changes.get("run.precision", "")
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=2e-2 if half else 1e-3, atol=1e-5)
    assert len(recorded) == len(launched)
    size = torch.stack([gradient.norm() for gradient in launched]).norm()
    error = torch.stack([(a - b).norm() for a, b in zip(recorded, launched, strict=True)]).norm()
    assert error < (5e-2 if half else 1e-3) * size


@pytest.mark.parametrize(
    ("precision", "recorded"),
    [("32-true", False), ("bf16-mixed", False), ("16-mixed", False), ("bf16-mixed", True)],
)
def test_a_run_learns_an_easy_set_and_goes_on(root, tmp_path, precision, recorded):
    changes = {
        "run.accelerator": "cuda",
        "run.cuda_graphs": recorded,
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
