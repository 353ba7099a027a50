"""README and docs are true: commands run or parse, tables are what the results say, links lead somewhere."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from bench import report
from pseudoseg_fast import train
from pseudoseg_fast.config import parse_config

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
BENCH_PAGES = ("bench/README.md", "bench/tuning.md")
PROGRAM = re.compile(r"python -m (pseudoseg_fast\.\w+)|-m (pseudoseg_fast\.\w+)")
TINY = """
data: {short_side: null, crop_size: 32, scales: [1.0], workers: 0}
model: {encoder_name: test_efficientnet, encoder_weights: null, weights: null, attention_dim: 8}
method: {start_u: 0}
optim: {batch_size: 2}
run: {accelerator: cpu}
"""
QUICKLY = ("--config", "tiny.yaml", "--run.overwrite", "true", "--optim.steps", "2")


def commands(page):
    """Programs and arguments of a page's blocks of shell commands, in order."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := PROGRAM.search(line):
                found.append((match[1] or match[2], shlex.split(line[match.end() :], comments=True)))
    return found


def test_every_page_is_looked_at():
    assert {"README.md", "docs/cluster.md", "docs/data.md", "docs/deployment.md"} <= set(PAGES)
    for page, least in {
        "README.md": 6,
        "docs/cluster.md": 4,
        "docs/data.md": 5,
        "docs/deployment.md": 3,
    }.items():
        assert len(commands(page)) >= least, page


@pytest.mark.parametrize("page", PAGES)
def test_training_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").write_text("data: {root: photos}\n")
    inline = re.findall(r"`python -m pseudoseg_fast\.train (--config [^`]+)`", (ROOT / page).read_text())
    trained = [arguments for program, arguments in commands(page) if program == "pseudoseg_fast.train"]
    for arguments in [*trained, *map(shlex.split, inline)]:
        assert parse_config(arguments, "", "")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the pictures that the pages speak of."""
    folder = tmp_path_factory.mktemp("pages")
    made = tiny.make_set(folder / "made")
    for index in range(8):
        part = "val" if index in (5, 6, 7) else "train"
        for kind in ("images", "masks"):
            source = made / kind / f"{index}.png"
            target = folder / "photos" / kind / part / f"{index}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.exists():
                shutil.copy(source, target)
    shutil.copy(made / "classes.txt", folder / "photos" / "classes.txt")
    name = (folder / "photos" / "classes.txt").read_text().splitlines()[-1]
    (folder / "photos" / "tags.csv").write_text(
        f"image,tags\nimages/train/2.png,{name}\nimages/train/3.png,{name}\n"
    )
    (folder / "more").mkdir()
    shutil.copy(made / "images" / "0.png", folder / "more" / "0.jpg")
    return folder


def test_commands_of_the_pages_run_one_after_another(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    Path("tiny.yaml").write_text(TINY)
    for page in ("README.md", "docs/deployment.md", "docs/data.md"):
        for program, arguments in commands(page):
            if program == "pseudoseg_fast.demo" or arguments == ["--config", "demo"]:
                continue  # a server, and minutes of training; tests of their own
            if program == "pseudoseg_fast.train":
                arguments = [*arguments, *QUICKLY]
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            status = importlib.import_module(program).main(arguments)
            assert not status, f"{page}: {program} {arguments}\n{capsys.readouterr()}"
    for name in (
        "runs/photos/report.html",
        "runs/tagged/report.html",
        "model.onnx",
        "masks",
        "check.png",
        "photos.yaml",
    ):
        assert Path(name).exists(), name


def test_tables_are_what_the_results_say():
    for page in report.DOCUMENTS:
        text = (ROOT / page).read_text()
        assert report.fill(text) == text, f"{page}: run python -m bench.report"


@pytest.mark.parametrize("page", [*PAGES, *BENCH_PAGES])
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", [*PAGES, *BENCH_PAGES])
def test_programs_know_the_options_that_pages_give_them(page, monkeypatch, capsys):
    """Benchmarks and tools, which take too long to be run here."""
    text = (ROOT / page).read_text()
    for module, arguments in re.findall(r"python -m ((?:bench|tools)\.\w+)([^`\n]*)", text):
        if options := re.findall(r"--[\w-]+", arguments):
            monkeypatch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit, match=r"^0$"):
                importlib.import_module(module).main()
            known = capsys.readouterr().out
            assert not [name for name in options if f"{name} " not in known], f"{page}: {module}"


@pytest.mark.parametrize("page", [*PAGES, *BENCH_PAGES])
def test_benchmarks_and_results_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`(bench/[\w/.-]+\.(?:json|jsonl|py|sh|yaml))`", text):
        assert (ROOT / name).exists(), f"{page}: {name}"
    for module in re.findall(r"python -m (bench\.\w+|tools\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page}: {module}"


def test_the_slurm_script_gives_its_processes_their_cpus_and_is_one_that_a_shell_can_read():
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL
    )
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    assert options["cpus-per-task"] == "8"
    assert options["open-mode"] == "append"
    assert script.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n") < script.index("\nsrun ")
    assert f"$? -eq {train.INTERRUPTED} ]" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`(\w+)`", text[text.index("| module | what it is |") :]))
    package = ROOT / "pseudoseg_fast"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert not (modules | folders) - named - {"presets"}
