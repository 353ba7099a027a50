"""Train a network: ``python -m pseudoseg_fast.train --config PRESET_OR_FILE [--data.root DIR ...]``."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

import yaml

from pseudoseg_fast.config import Config, parse_config, to_dict
from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.run_folder import clear_folder, held, holds_run, is_own, run_folder
from pseudoseg_fast.stop import StopSignal
from pseudoseg_fast.summary import write_summary
from pseudoseg_fast.trainer import Trainer
from pseudoseg_fast.whole_file import replace_text

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def train(config: Config) -> int:
    """Run ``config`` from its lists to its summary; return the process's exit status."""
    folder, checkpoints = run_folder(config)
    trainer = Trainer(config, folder)
    if checkpoints:
        trainer.restore(checkpoints)
    with held(folder):
        if checkpoints and is_own(folder, checkpoints[0]):
            trainer.csv_log.go_on(trainer.step)
        elif holds_run(folder):
            clear_folder(folder)
        saved = to_dict(config)
        saved["run"] |= {"resume": None, "overwrite": False}
        replace_text(folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
        return train_in(folder, trainer)


def train_in(folder: Path, trainer: Trainer) -> int:
    """Train to the last step and its summary, or to where a signal stops it; return the process's exit status."""
    print(trainer.describe())
    if trainer.fabric.device.type == "cpu":
        keep_freed_memory()
    with StopSignal() as stop:
        trainer.fit(stop)
    steps = trainer.config.optim.steps
    if trainer.step < steps:
        print(
            f"stopped after step {trainer.step} of {steps}, all of it saved; to go on:\n"
            f"  python -m pseudoseg_fast.train --config {shlex.quote(str(folder / 'config.yaml'))} --run.resume auto"
        )
        return INTERRUPTED
    with trainer.fabric.autocast():
        write_summary(trainer, folder)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.train"
    config = parse_config(sys.argv[1:] if arguments is None else arguments, prog, __doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pseudoseg_fast").setLevel(logging.INFO)
    try:
        return train(config)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
