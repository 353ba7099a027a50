"""Several processes: the gradients of one with a larger batch, scores that count every picture once, restarts."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pseudoseg_fast import train
from pseudoseg_fast.children import Watcher, death
from pseudoseg_fast.config import RunConfig, parse_config
from pseudoseg_fast.distributed import freeze_unused, make_fabric, meet, processes
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.network import Network
from pseudoseg_fast.step import StepLosses
from pseudoseg_fast.trainer import Trainer

# No batch norm and nothing random: a step is a sum over pictures.
SEPARABLE = {
    "model.arch": "FPN",
    "model.encoder_name": "test_convnext",
    "model.decoder": '{"decoder_dropout": 0}',
    "method.ema": 0.9,
    "method.norm": "none",  # the others look at SGC, whose norm is over the local batch
    "method.gamma": 1,
    "method.weight_sa": 0,
    "method.class_weight": "balanced",
    "method.image_labels": "true",
    "data.tags": "tags.csv",
    "data.scales": [0.5, 1.0],  # padding, so that processes differ in their numbers of pixels
    "optim.lr": 0.1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc;square", "images/2.png,disc"])
    return root


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(count, folder, function, *arguments):
    """Call a function in processes that torchrun could have started; return what they return, by rank."""
    port = free_port()

    def work(rank):
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.set_num_threads(1)
        torch.save(function(*arguments), folder / f"{rank}.pt")

    workers = [
        multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def step_of(root, folder, changes):
    """Take a training step; return the gradients, the loss terms, the pictures and the scores afterwards."""
    config = parse_config(tiny.options(root, folder, SEPARABLE | changes), "", "")
    trainer = Trainer(config, folder)
    loaders = (labeled_loader, unlabeled_loader)
    streams = [iter(load(config, trainer.data, trainer.network, 0, **trainer.rank)) for load in loaders]
    batches = trainer.next_batches(*streams)
    losses = trainer.training_step(batches, 1.0)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.network.named_parameters()
        if parameter.grad is not None
    }
    trainer.step = 1
    trainer.evaluate()
    names = [name for pair in batches for batch in pair for name in batch["name"]]
    return gradients, losses, names, trainer.scores


def assert_same_step(parts, whole):
    for gradients, _, _, scores in parts:
        assert gradients.keys() == whole[0].keys()
        for name, gradient in gradients.items():
            error = (gradient - whole[0][name]).norm() / whole[0][name].norm()
            assert error < 1e-5, name
        assert scores.pixels == whole[3].pixels
        assert scores.iou == pytest.approx(whole[3].iou, nan_ok=True)
    for name, loss in whole[1].items():
        torch.testing.assert_close(torch.stack([losses[name] for _, losses, _, _ in parts]).mean(), loss)
    assert sorted(name for _, _, names, _ in parts for name in names) == sorted(whole[2])


@pytest.mark.parametrize("views", [1, 2])
def test_two_processes_or_two_passes_give_the_gradients_of_one(root, tmp_path, views):
    changes = {"method.strong_views": views, "data.cutout": 0.5}
    whole = step_of(root, tmp_path / "whole", changes | {"optim.batch_size": 4})
    assert len(whole[2]) == 8
    assert_same_step([step_of(root, tmp_path / "passes", changes | {"optim.accumulate": 2})], whole)
    assert_same_step(in_processes(2, tmp_path, step_of, root, tmp_path / "processes", changes), whole)


def test_shares_are_not_rounded_to_half_precision(root, tmp_path):
    changes = {"run.precision": "bf16-mixed"}
    whole = step_of(root, tmp_path / "whole", changes | {"optim.batch_size": 4})[1]
    passes = step_of(root, tmp_path / "passes", changes | {"optim.accumulate": 2})[1]
    # A share rounded to 8 bits is off by up to 2e-3; the network's own rounding does not depend on the batch.
    torch.testing.assert_close(passes["L_s"], whole["L_s"], rtol=2e-4, atol=0)


def draws_and_norms(root, folder):
    """Take a step of a network with batch norms and dropout; return weights, running statistics and a draw."""
    config = parse_config(tiny.options(root, folder), "", "")
    trainer = Trainer(config, folder)
    loaders = (labeled_loader, unlabeled_loader)
    streams = [iter(load(config, trainer.data, trainer.network, 0, **trainer.rank)) for load in loaders]
    trainer.training_step(trainer.next_batches(*streams), 1.0)
    return trainer.network.state_dict(), float(torch.rand(()))


def test_processes_keep_the_same_weights_and_draw_differently(root, tmp_path):
    (one, draw), (other, another) = in_processes(2, tmp_path, draws_and_norms, root, tmp_path / "run")
    assert draw != another
    for name, values in one.items():
        assert torch.equal(values, other[name]), name


def test_parameters_that_nothing_depends_on_are_frozen():
    network = Network("FPN", "test_convnext", None, classes=3)
    network.encoder.forgotten = torch.nn.Linear(2, 2)
    state = torch.get_rng_state()
    freeze_unused(network, 30)
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert {"encoder.forgotten.weight", "encoder.forgotten.bias"} <= set(frozen)
    assert all(name.startswith("encoder.") for name in frozen)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [
        ("DeepLabV3Plus", "test_efficientnet"),  # timm's norms have an activation
        ("Unet", "resnet18"),
        ("FPN", "test_convnext"),
    ],
)
def test_on_gpus_every_batch_norm_is_synchronised_and_keeps_its_name(
    root, tmp_path, monkeypatch, arch, encoder
):
    changes = {"model.arch": arch, "model.encoder_name": encoder}
    ours = Trainer(parse_config(tiny.options(root, tmp_path / "run", changes), "", ""), tmp_path / "run")
    plain = ours.network
    ours.fabric = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    synchronised = ours.build()
    norms = {name: module for name, module in plain.named_modules() if isinstance(module, _BatchNorm)}
    modules = dict(synchronised.named_modules())
    for name, norm in norms.items():
        assert isinstance(modules[name], torch.nn.SyncBatchNorm), name
        for option in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
            assert getattr(modules[name], option) == getattr(norm, option), name
        if hasattr(norm, "act"):
            assert type(modules[name].act) is type(norm.act), name
    assert sum(isinstance(module, _BatchNorm) for module in modules.values()) == len(norms)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (plain, synchronised)
    ]
    assert shapes[0] == shapes[1]
    ours.config.run.sync_batchnorm = False
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in ours.build().modules())


SCRIPT = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
SLURM = SCRIPT | {"SLURM_STEP_ID": "0"}
INTERACTIVE = SCRIPT | {"SLURM_STEP_ID": "4294967290"}
SHELL = SLURM | {"SLURM_PTY_PORT": "40000"}
NESTED = SHELL | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        ({}, "auto", (1, 1)),
        ({}, 2, (2, 1)),
        (SLURM, "auto", (4, 2)),
        (TORCHRUN, "auto", (3, 2)),
        (SLURM | TORCHRUN, 3, (3, 2)),
        (SCRIPT, "auto", (1, 1)),
        (SCRIPT, 2, (2, 1)),
        (INTERACTIVE, 2, (2, 1)),
        (SHELL, 2, (2, 1)),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, 2, (2, 1)),
        (NESTED, "auto", (4, 2)),
    ],
)
def test_the_launcher_says_how_many_processes_there_are(monkeypatch, environment, devices, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes(RunConfig(devices=devices).devices) == expected


@pytest.mark.parametrize(("environment", "launcher"), [(SLURM, "srun"), (TORCHRUN, "torchrun")])
def test_devices_that_contradict_the_launcher_are_refused(monkeypatch, environment, launcher):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"run.devices is 2, but {launcher} started"):
        processes(2)


def test_a_script_without_srun_is_told_of_the_tasks_that_it_leaves_unused(monkeypatch, caplog):
    for name, value in SCRIPT.items():
        monkeypatch.setenv(name, value)
    fabric = make_fabric(RunConfig(accelerator="cpu"))
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert "room for 8 tasks, this is one process: start it with srun" in caplog.text


def test_a_script_of_one_task_starts_processes_itself(root, tmp_path):
    command = [sys.executable, "-m", "pseudoseg_fast.train"]
    changes = {"run.devices": 2, "optim.steps": 1}
    environment = SCRIPT | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *tiny.options(root, tmp_path / "run", changes)],
        env=os.environ | environment,
        check=True,
        timeout=120,
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


@pytest.fixture
def torchrun(root):
    """Start runs in two processes; none of them outlives the test."""
    started = []

    def start(folder, changes, *options):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        changes = {
            "run.log_every": 1,
            "run.eval_every": 4,
            "run.checkpoint_every": 2,
            "optim.steps": 40,
        } | changes
        arguments = ["-m", "pseudoseg_fast.train", *tiny.options(root, folder, changes)]
        started.append(
            subprocess.Popen(
                [*command, *options, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
        return started[-1]

    yield start
    for process in started:
        for worker in workers_of(process):
            os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def test_torchrun_goes_on_from_the_last_checkpoint_when_a_process_dies(torchrun, tmp_path):
    """One of two processes is killed; the other ends, both are started again, and the result is to the bit the same."""
    changes = {"method.ema": 0.9, "run.resume": "auto"}
    run = torchrun(tmp_path / "killed", changes, "--max-restarts=1")
    whole = torchrun(tmp_path / "whole", changes)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    wait_for(lambda: run.poll() is not None or last.exists())
    os.kill(workers_of(run)[-1], signal.SIGKILL)
    printed, _ = run.communicate(timeout=240)
    assert run.returncode == 0, printed
    assert whole.wait(240) == 0
    states = [tiny.checkpoint(tmp_path / name) for name in ("killed", "whole")]
    assert states[0]["step"] == states[1]["step"] == 40
    for part in ("model", "teacher"):
        for name, values in states[0][part].items():
            assert torch.equal(values, states[1][part][name]), name
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert results[0]["miou"] == results[1]["miou"]


def test_a_stop_of_two_processes_that_one_started_is_saved(root, tmp_path, monkeypatch):
    """However long the first one takes to save: the other one's end must not end it."""
    folder = tmp_path / "run"
    slow = (
        "import sys, time; from pseudoseg_fast import checkpoint, train; save = checkpoint.save\n"
        "checkpoint.save = lambda *given: (time.sleep(6), save(*given))\n"  # longer than Fabric's look at its processes
        "sys.exit(train.main())"
    )
    script = tmp_path / "slow.py"
    script.write_text(slow)
    changes = {"run.devices": 2, "run.log_every": 1, "optim.steps": 10_000, "run.eval_every": 10_000}
    process = subprocess.Popen(
        [sys.executable, script, *tiny.options(root, folder, changes)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    try:
        wait_for(lambda: len(tiny.log(folder)) > 2 if (folder / "log/metrics.csv").exists() else False)
        process.terminate()
        assert process.wait(60) == 130
    finally:
        for worker in workers_of(process):
            os.kill(worker, signal.SIGKILL)
        process.kill()
    assert tiny.checkpoint(folder)["step"] >= 2


def test_a_process_that_a_signal_ends_is_named_with_the_signal(root, tmp_path):
    changes = {"run.devices": 2, "run.log_every": 1, "optim.steps": 10_000, "run.eval_every": 10_000}
    process = subprocess.Popen(
        [sys.executable, "-m", "pseudoseg_fast.train", *tiny.options(root, tmp_path / "run", changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        log = tmp_path / "run" / "log" / "metrics.csv"
        wait_for(lambda: log.exists() and len(tiny.log(tmp_path / "run")) > 2)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode
    reason = "process 1 was killed by signal 9 (SIGKILL), which usually means that the machine had no memory left\n"
    assert printed.count(" was killed by ") == printed.count(reason) == 1


@pytest.mark.parametrize(
    ("number", "said"), [(15, "ended by signal 15 (SIGTERM)"), (63, "ended by signal 63")]
)
def test_other_signals_are_named_without_a_guess(number, said):
    assert death(number) == said


def poisoned(root, folder):
    """Train with a loss that is NaN in the second process alone; return what a process says."""
    forward = StepLosses.forward

    def poison(self, *arguments):
        losses = forward(self, *arguments)
        return {
            name: loss * (float("nan") if os.environ["RANK"] == "1" else 1) for name, loss in losses.items()
        }

    StepLosses.forward = poison  # in a process of its own
    config = parse_config(tiny.options(root, folder), "", "")
    try:
        train.train(config, make_fabric(config.run))
    except NotFinite as error:
        return str(error)


def test_only_the_process_whose_loss_is_not_finite_names_its_pictures(root, tmp_path):
    innocent, guilty = in_processes(2, tmp_path, poisoned, root, tmp_path / "run")
    assert innocent.startswith(
        "step 1: a loss of another process is NaN, infinite or exploded; that process names its pictures\n"
    )
    assert "images/" not in innocent
    assert guilty.startswith(
        "step 1: L_s is nan, L_sa is nan, L_x is nan, L_u is nan, on these pictures:\n  images/"
    )


def refusal(root, folder):
    """Start a run with an option that depends on the process; return what it says."""
    rank = os.environ["RANK"]
    options = tiny.options(root, folder, {"optim.lr": 0.1 * (1 + int(rank)), "run.log_every": 1 + int(rank)})
    try:
        config = parse_config(options, "", "")
        train.train(config, make_fabric(config.run))
    except ValueError as error:
        return str(error)


def test_processes_that_were_given_different_options_are_refused(root, tmp_path):
    for message in in_processes(2, tmp_path, refusal, root, tmp_path / "run"):
        assert "all processes expect the same options, got" in message
        assert "optim.lr: 0.1, 0.2" in message
        assert "run.log_every: 1, 2" in message
        assert message.count(": ") == 2
    assert not (tmp_path / "run").exists()


def test_processes_agree_on_a_word_that_a_former_start_does_not_know():
    store = torch.distributed.HashStore()
    # What a former start of two processes left.
    for rank in range(2):
        store.set(f"nonce/{rank}", f"old {rank}")
        store.set(f"digest/{rank}", "old")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, store, 0, 2)
        time.sleep(0.2)
        assert not first.done()  # it has seen the other's old nonce alone
        second = pool.submit(meet, store, 1, 2)
        words = [first.result(20), second.result(20)]
    assert words[0] == words[1]


def test_a_death_that_nobody_can_be_told_of_is_no_error(monkeypatch):
    child = SimpleNamespace(poll=lambda: -signal.SIGKILL)
    watcher = Watcher(SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[]))))
    watcher.children = [child]

    def broken(*_):
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        watcher.end(failed=True)
    assert watcher.told == {1}
