"""Losses that are not finite, and memory that runs out: found, named, and nothing of them kept."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from same_runs import assert_same_runs

from pseudoseg_fast import stepper, train, trainer
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.csv_log import CsvLog
from pseudoseg_fast.finite import NotFinite, Watch, sound
from pseudoseg_fast.memory import is_out_of_memory, largest_batch
from pseudoseg_fast.step import StepLosses


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


def poison(monkeypatch, *steps, factor=float("nan"), term="L_u"):
    """Multiply a loss, the consistency loss unless told, of some steps, counted from 1, with a factor."""
    forward = StepLosses.forward
    calls = []

    def wrapper(self, *arguments):
        losses = forward(self, *arguments)
        calls.append(len(calls) + 1)
        if calls[-1] in steps:
            losses[term] = losses[term] * factor
        return losses

    monkeypatch.setattr(StepLosses, "forward", wrapper)


def test_a_step_that_is_not_finite_ends_the_run_with_its_pictures(root, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 3)
    changes = {"run.checkpoint_every": 2, "run.log_every": 100, "optim.steps": 9}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    found = re.search(r"error: step 3: L_u is nan, on these pictures:\n((?:  images/\d.png\n)+)", message)
    assert 2 <= found.group(1).count("\n") <= 4
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"the last checkpoint is {last}, to go on from with --run.resume auto" in message
    assert tiny.checkpoint(tmp_path / "run")["step"] == 2


def test_rows_that_wait_are_written_when_a_run_fails(root, tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with monkeypatch.context() as patch:
        write, refusals = CsvLog._write, [OSError(28, "No space left on device")] * 2
        patch.setattr(CsvLog, "_write", lambda log: refusals.pop() if refusals else write(log))
        changes = {"run.log_every": 1, "run.eval_every": 100, "optim.steps": 9}
        assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    assert [row["step"] for row in tiny.log(tmp_path / "run")] == [1, 2]


def test_steps_that_are_not_finite_are_left_out_when_asked(root, tmp_path, monkeypatch, caplog, capsys):
    folder = tmp_path / "run"
    changes = {"run.nonfinite": "skip", "run.log_every": 1, "run.checkpoint_every": 1, "optim.steps": 2}
    with monkeypatch.context() as patch:
        poison(patch, 2)
        assert train.main(tiny.options(root, folder, changes | {"method.ema": 0.9})) == 0
    assert "skipped step 2: L_u is nan" in caplog.text
    assert "\nsteps left out, whose loss or gradient was not sound: 1\n" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 1
    assert '<b>1</b><span class="dim">steps left out</span>' in (folder / "report.html").read_text()
    state = tiny.checkpoint(folder)
    assert train.main(tiny.options(root, tmp_path / "one", changes | {"method.ema": 0.9})) == 0
    assert state["step"] == 2
    for part in ("model", "teacher"):
        assert all(values.isfinite().all() for values in state[part].values())


def test_checkpoints_are_not_given_up_for_those_of_steps_left_out(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stepper, "MAX_SKIPPED", 3)
    poison(monkeypatch, 4, 5, 6, 7)
    changes = {"run.nonfinite": "skip", "run.checkpoint_every": 1, "optim.steps": 9, "run.eval_every": 2}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2.ckpt", "step-3.ckpt"]
    message = capsys.readouterr().err
    assert f"go on from an older one, such as --run.resume {folder / 'step-2.ckpt'}" in message
    assert "or leave such steps out" not in message


def test_an_evaluation_whose_answers_are_nan_is_told_of_and_not_the_best(root, tmp_path, monkeypatch, caplog):
    evaluate, calls = trainer.evaluate, []

    def second_is_nan(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise NotFinite("the network answers 1 of the pictures with NaN")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(trainer, "evaluate", second_is_nan)
    assert train.main(tiny.options(root, tmp_path / "run", {"run.eval_every": 1})) == 0
    assert "step 2 is not scored: the network answers 1 of the pictures with NaN" in caplog.text
    scores = {row["step"]: row["mIoU"] for row in tiny.log(tmp_path / "run") if "mIoU" in row}
    assert [step for step, score in scores.items() if math.isnan(score)] == [2]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["miou"]["best_step"] != 2


def test_steps_are_not_left_out_for_ever(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stepper, "MAX_SKIPPED", 1)
    poison(monkeypatch, 1, 3, 4)
    changes = {"run.nonfinite": "skip", "optim.steps": 9}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    assert "2 steps in succession; step 4: L_u is nan" in message
    assert "no checkpoint had been written yet" in message


@pytest.mark.parametrize(
    ("poisoned", "every", "status"),
    [
        ([3, 4], 2, 2),  # an interval
        ([5, 6, 7], 4, 2),  # all that is left
        ([7], 6, 0),
        ([1, 2, 3, 4, 5, 6, 7], 100, 2),
        ([2, 3], 2, 0),
        ([3, 5], 1, 0),
    ],
)
def test_a_run_of_which_nothing_is_left_stops(root, tmp_path, monkeypatch, capsys, poisoned, every, status):
    poison(monkeypatch, *poisoned)
    changes = {"run.nonfinite": "skip", "optim.steps": 7, "run.eval_every": every}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == status
    if status:
        message = capsys.readouterr().err
        assert (
            f"step {poisoned[-1]}: none of the last {len(poisoned)} steps was sound, all were left out"
            in message
        )


def test_a_run_whose_last_step_alone_is_left_and_not_sound_stops(root, tmp_path, monkeypatch, capsys):
    changes = {"run.nonfinite": "skip", "optim.steps": 3}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0
    poison(monkeypatch, 1)
    again = changes | {"optim.steps": 4, "run.resume": "auto"}
    assert train.main(tiny.options(root, tmp_path / "run", again)) == 2
    assert "step 4: none of the last 1 steps was sound" in capsys.readouterr().err


def test_an_infinite_gradient_is_found_although_the_losses_are_finite():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([0.0, float("inf"), 0.0])
    losses = {"L_s": torch.tensor(1.0)}
    assert sound(losses, None).tolist() == [True, True]
    assert sound(losses, [parameter]).tolist() == [True, False]
    watch = Watch()
    with pytest.raises(NotFinite, match="step 7: the losses are finite, but the gradient is not"):
        watch.add(7, ["a.png"], losses, sound(losses, [parameter]))


@pytest.mark.parametrize(("factor", "status"), [(1e3, 0), (1e5, 2)])
def test_a_loss_that_explodes_ends_the_run_long_before_it_is_infinite(
    root, tmp_path, monkeypatch, capsys, factor, status
):
    poison(monkeypatch, 3, factor=factor)
    changes = {"run.checkpoint_every": 2, "optim.steps": 4}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == status
    if status:
        message = capsys.readouterr().err
        said = r"step 3: L_u is \d\.\d+e\+04, above the limit of 10000, on these pictures:\n  images"
        assert re.search(said, message)
        assert "last.ckpt, to go on from with --run.resume auto" in message


def test_a_loss_that_explodes_is_left_out_when_asked(root, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, 3, factor=1e5)
    changes = {"run.nonfinite": "skip", "optim.steps": 4}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0
    assert "skipped step 3: L_u is " in caplog.text


def test_a_rate_that_is_far_too_high_does_not_finish(root, tmp_path, capsys):
    changes = {"method.name": "supervised", "optim.lr": 30, "optim.steps": 30}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    assert "above the limit of 10000" in capsys.readouterr().err


def test_a_term_of_a_large_weight_may_be_large(root, tmp_path):
    changes = {"method.weight_u": 1e5, "optim.lr": 1e-8}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0


def test_each_term_has_the_limit_of_its_own_weight(root, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 2, factor=1e5, term="L_s")
    changes = {"method.weight_u": 1e5, "optim.lr": 1e-8}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    assert re.search(r"step 2: L_s is \d\.\d+e\+05, above the limit of 10000, on", capsys.readouterr().err)


def test_a_share_of_a_step_does_not_count_against_the_limit(root, tmp_path, monkeypatch):
    """As of a process with far more pixels than the others."""
    monkeypatch.setattr(stepper, "shares", lambda fabric, denominators: torch.full_like(denominators, 2e4))
    changes = {"optim.accumulate": 2, "optim.lr": 1e-8}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0


@pytest.mark.parametrize("interval", ["run.eval_every", "run.checkpoint_every"])
def test_weights_that_are_not_finite_are_neither_saved_nor_the_best(root, tmp_path, capsys, interval):
    changes = {"method.name": "supervised", "optim.lr": 1e40, interval: 1}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    assert "error: step 1: weights or running statistics are not finite" in message
    assert "no checkpoint had been written yet; lower optim.lr" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("owner", ["network", "teacher"])
@pytest.mark.parametrize("kind", ["parameters", "buffers"])
def test_all_that_a_checkpoint_is_good_for_is_looked_at(root, tmp_path, owner, kind):
    config = parse_config(tiny.options(root, tmp_path / "run", {"method.ema": 0.9}), "", "")
    ours = trainer.Trainer(config, tmp_path / "run")
    ours.stepper.check_weights(0)
    model = ours.network if owner == "network" else ours.teacher.model
    value = [tensor for tensor in getattr(model, kind)() if tensor.is_floating_point()][-1]
    with torch.no_grad():
        value.view(-1)[-1] = float("inf")
    with pytest.raises(NotFinite, match=r"step 0: weights or running statistics are not finite"):
        ours.stepper.check_weights(0)


@pytest.mark.parametrize("limit", [0, 1, 5, 16])
def test_the_largest_batch_that_fits_is_found(limit):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("out of memory")

    assert largest_batch(attempt, 16) == limit
    assert len(tried) <= 5


@pytest.mark.parametrize("limit", range(8))
@pytest.mark.parametrize("least", [2, 4])
def test_a_batch_too_small_to_train_on_does_not_fit(least, limit):
    def attempt(size):
        if size > limit:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        if size < least:
            raise ValueError("Expected more than 1 value per channel when training")

    assert largest_batch(attempt, 7) == (limit if limit >= least else 0)


def test_a_batch_whose_loss_is_not_finite_fits():
    def attempt(size):
        raise NotFinite if size < 4 else MemoryError

    assert largest_batch(attempt, 7) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("could not create a primitive", True),
        ("std::bad_alloc (originally from torch_parallel_for at ...)", True),
        ("could not create a primitive descriptor for a convolution forward propagation primitive", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_memory_that_runs_out_is_known_by_what_libraries_say(text, expected):
    assert is_out_of_memory(RuntimeError(text)) == expected


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (3, "3 + 3 fit: give --optim.batch_size 3, and --optim.accumulate 2 for as many in a step"),
        (0, "no batch fits; or lower --data.crop_size"),
        (1, "no batch fits; or lower --data.crop_size"),
    ],
)
def test_memory_that_runs_out_ends_with_the_batch_that_fits(root, tmp_path, monkeypatch, capsys, limit, said):
    forward = StepLosses.forward

    def too_large(self, labeled, *others):
        if len(labeled["image"]) > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        if len(labeled["image"]) == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return forward(self, labeled, *others)

    monkeypatch.setattr(StepLosses, "forward", too_large)
    assert train.main(tiny.options(root, tmp_path / "run", {"optim.batch_size": 5})) == 2
    message = capsys.readouterr().err
    assert "out of memory at step 1, in a pass of 5 labelled and 5 unlabelled pictures of 32 px" in message
    assert said in message


def test_a_run_that_diverged_goes_on_as_it_is_advised(root, tmp_path, monkeypatch, capsys):
    changes = {"run.checkpoint_every": 2, "optim.steps": 4, "run.precision": "bf16-mixed"}
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 3)
        assert train.main(tiny.options(root, folder, changes)) == 2
    message = capsys.readouterr().err
    for advice in ("--run.resume auto", "lower optim.lr", "lengthen optim.warmup", "run.precision 32-true"):
        assert advice in message
    changes |= {
        "optim.lr": 0.001,
        "optim.warmup": 4,
        "run.precision": "32-true",
        "run.resume": "auto",
    }
    assert train.main(tiny.options(root, folder, changes)) == 0
    assert tiny.checkpoint(folder)["step"] == 4


def test_a_run_without_memory_goes_on_with_the_batches_that_fit(root, tmp_path, monkeypatch, capsys):
    forward = StepLosses.forward

    def too_large(self, labeled, unlabeled, weight):
        if unlabeled is not None and len(labeled["image"]) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return forward(self, labeled, unlabeled, weight)

    monkeypatch.setattr(StepLosses, "forward", too_large)
    folder = tmp_path / "run"
    changes = {
        "optim.batch_size": 4,
        "optim.unlabeled_batch_size": 6,
        "optim.steps": 4,
        "method.start_u": 2,
        "run.checkpoint_every": 2,
    }
    assert train.main(tiny.options(root, folder, changes)) == 2
    message = capsys.readouterr().err
    assert f"{folder / 'checkpoints' / 'last.ckpt'}, to go on from with --run.resume auto" in message
    advised = re.search(r"2 \+ 3 fit: give (.*), and (.*) for as many", message)
    options = " ".join(advised.groups()).split()
    assert options[::2] == ["--optim.batch_size", "--optim.unlabeled_batch_size", "--optim.accumulate"]
    assert train.main([*tiny.options(root, folder, changes), *options, "--run.resume=auto"]) == 0
    assert tiny.checkpoint(folder)["step"] == 4


LATER = {"method.start_u": 4, "method.cutmix": 0.5, "method.ema": 0.9, "optim.steps": 6}


@pytest.mark.parametrize("changes", [{}, {"method.ema": 0, "optim.accumulate": 2}])
def test_a_rehearsal_of_later_passes_changes_no_bit(root, tmp_path, monkeypatch, changes):
    changes = LATER | changes
    assert train.main(tiny.options(root, tmp_path / "without", changes)) == 0
    monkeypatch.setattr(trainer.Trainer, "rehearses", True)
    rehearsals = []
    rehearse = trainer.Trainer.rehearse
    monkeypatch.setattr(
        trainer.Trainer, "rehearse", lambda ours: (rehearsals.append(ours.step), rehearse(ours))
    )
    assert train.main(tiny.options(root, tmp_path / "with", changes)) == 0
    assert rehearsals == [1]
    assert_same_runs(tmp_path / "without", tmp_path / "with")


def test_memory_for_later_passes_is_missed_at_once(root, tmp_path, monkeypatch, capsys):
    forward = StepLosses.forward

    def too_large(self, labeled, unlabeled, weight):
        if unlabeled is not None and len(labeled["image"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, labeled, unlabeled, weight)

    monkeypatch.setattr(StepLosses, "forward", too_large)
    monkeypatch.setattr(trainer.Trainer, "rehearses", True)
    changes = LATER | {"optim.batch_size": 4, "run.log_every": 1}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    assert (
        "out of memory in a rehearsal of step 5, in a pass of 4 labelled and 4 unlabelled pictures of 32 px"
        in message
    )
    assert "give --optim.batch_size 2, and --optim.accumulate 2" in message
    assert [row["step"] for row in tiny.log(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("device", "step", "changes", "expected"),
    [
        ("cuda", 1, LATER, True),
        ("cpu", 1, LATER, False),
        ("cuda", 4, LATER, False),
        ("cuda", 0, {}, False),
        ("cuda", 0, {"method.name": "supervised", "method.start_u": 2}, False),
    ],
)
def test_what_comes_later_is_rehearsed_on_gpus(root, tmp_path, device, step, changes, expected):
    config = parse_config(tiny.options(root, tmp_path / "run", changes), "", "")
    ours = trainer.Trainer(config, tmp_path / "run")
    ours.fabric, ours.step = SimpleNamespace(device=torch.device(device)), step
    assert ours.rehearses == expected
