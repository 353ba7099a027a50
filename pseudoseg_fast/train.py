"""Train a network: ``python -m pseudoseg_fast.train --config PRESET_OR_FILE [--data.root DIR ...]``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from pseudoseg_fast.children import Watcher
from pseudoseg_fast.config import Config, RunConfig, parse_config, preset_hint, to_dict
from pseudoseg_fast.data.findings import crops_in
from pseudoseg_fast.distributed import (
    check_same_options,
    end_processes,
    from_first,
    gather,
    is_child,
    launcher,
    make_fabric,
)
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.kept import go_back, newest_first
from pseudoseg_fast.memory import OutOfMemory, keep_freed_memory
from pseudoseg_fast.run_folder import (
    clear_folder,
    describe_run,
    forget_end,
    held,
    holds_run,
    is_own,
    is_restart,
    run_folder,
)
from pseudoseg_fast.stop import StopSignal
from pseudoseg_fast.summary import write_summary
from pseudoseg_fast.trainer import Trainer

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def train(config: Config, fabric: Fabric) -> int:
    """Run ``config`` from its lists to its summary; return the process's exit status."""
    check_same_options(fabric, common_options(config))
    restart = any(gather(fabric, is_restart()))
    folder, checkpoints = from_first(fabric, lambda: run_folder(config, restart=restart))
    trainer = Trainer(config, folder, fabric, pretrained=not checkpoints)
    path = trainer.restore(checkpoints) if checkpoints else None
    with ExitStack() as stack:
        from_first(fabric, lambda: stack.enter_context(held(folder)))
        go_on = path is not None and is_own(folder, path)
        from_first(fabric, lambda: prepare_folder(trainer, folder, go_on=go_on))
        if go_on and path == checkpoints[0]:  # those that could not be read stay until there is a new one
            from_first(fabric, lambda: go_back(folder / "checkpoints", path, trainer.step))
        if fabric.is_global_zero:
            print(trainer.describe())
            if config.data.short_side is None and (
                said := crops_in(trainer.data.labeled, config.data.crop_size)
            ):
                logger.warning(said)
        return train_in(folder, trainer)


def common_options(config: Config) -> dict[str, Any]:
    """Return the options that all processes must have been given alike: all but names of folders and workers."""
    own = {"data.root", "data.workers", "data.cache", "run.dir"}
    return {
        f"{group}.{name}": value
        for group, values in to_dict(config).items()
        for name, value in values.items()
        if f"{group}.{name}" not in own
    }


def prepare_folder(trainer: Trainer, folder: Path, *, go_on: bool) -> None:
    """Make the folder that of this run: its log goes on or begins anew, what it is is written."""
    if go_on:
        trainer.csv_log.go_on(trainer.step, scored=trainer.scored == trainer.step)
        trainer.tensorboard.go_on(trainer.step)
        if trainer.step < trainer.config.optim.steps:
            forget_end(folder, trainer.step)
    elif holds_run(folder) or trainer.config.run.overwrite:
        clear_folder(folder)
    describe_run(folder, trainer.config, trainer.data, trainer.fabric)


def train_in(folder: Path, trainer: Trainer) -> int:
    """Train to the last step and its summary, or to where a signal stops it; return the process's exit status."""
    fabric, run, steps = trainer.fabric, trainer.config.run, trainer.config.optim.steps
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with StopSignal() as stop:
        try:
            trainer.fit(stop)
        except NotFinite as error:
            said = advice(folder, run, pictures=error.pictures)
            raise NotFinite(f"{error}\n{said}") from error
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}\n{last_saved(folder)}") from error
    if trainer.step < steps:
        fabric.barrier()  # the first has saved: whoever leaves with a status other than 0 may end the others
        if fabric.is_global_zero:
            print(
                f"stopped after step {trainer.step} of {steps}, all of it saved; to go on:\n  {command(folder)}"
            )
        return 0 if is_child(fabric) else INTERRUPTED
    if fabric.is_global_zero:
        with fabric.autocast(), torch.compiler.set_stance("force_eager"):
            write_summary(trainer, folder)
    return 0


def command(folder: Path) -> str:
    """Return the command that goes on with the run in ``folder``, as this one was started."""
    program = {
        None: "python -m",
        "torchrun": "torchrun [its options as before] -m",
        "srun": "srun [its options as before] python -m",
    }[launcher()]
    config = shlex.quote(str(folder / "config.yaml"))
    return f"{program} pseudoseg_fast.train --config {config} --run.resume auto"


def advice(folder: Path, run: RunConfig, *, pictures: bool) -> str:
    """Return what to do about a run that has diverged; ``pictures`` says whether any have been named."""
    saved = newest_first(folder / "checkpoints")
    older = [path for path in saved if not path.samefile(saved[0])]
    return (
        last_saved(folder)
        + ("; look at these pictures, " if pictures else "; ")
        + "lower optim.lr or lengthen optim.warmup"
        + ("" if run.precision == "32-true" else ", try run.precision 32-true")
        + ("" if run.nonfinite == "skip" else ", or leave such steps out: --run.nonfinite skip")
        + (
            "\nif its first steps fail again, the weights in the last checkpoint are damaged already: go on "
            f"from an older one, such as --run.resume {shlex.quote(str(older[0]))}"
            if older
            else ""
        )
    )


def last_saved(folder: Path) -> str:
    """Return where a run can go on that has failed."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return "no checkpoint had been written yet"
    return f"the last checkpoint is {last}, to go on from with --run.resume auto"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.train"
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse_config(arguments, prog, __doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pseudoseg_fast").setLevel(logging.INFO)
    fabric, watcher, failed = None, None, True
    try:
        fabric = make_fabric(config.run)
        watcher = Watcher(fabric)
        if fabric.global_rank:
            logging.getLogger("pseudoseg_fast").setLevel(logging.WARNING)
        elif hint := preset_hint(arguments):
            logging.getLogger(__name__).warning("%s", hint)
        status = train(config, fabric)
        failed = False
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        if watcher:
            watcher.end(failed=True)  # says first what was the reason
        who = f"process {fabric.global_rank}: " if fabric and fabric.world_size > 1 else ""
        print(f"{prog}: error: {who}{error}", file=sys.stderr)
        return 2
    finally:
        if watcher:
            watcher.end(failed=False)
        if fabric:
            end_processes(fabric, failed=failed)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status and torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(status)  # in order, the group's end would wait for processes that wait for this one
    sys.exit(status)
