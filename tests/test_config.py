import dataclasses

import pytest
import yaml

from pseudoseg_fast import config as configuration
from pseudoseg_fast.config import (
    ADDED,
    PRESET_FOLDER,
    Config,
    RunConfig,
    choose_accelerator,
    from_dict,
    parse_config,
    preset_hint,
    presets,
    to_dict,
)

DATA = ["--data.root=R", "--data.labeled=l", "--data.unlabeled=u", "--data.val=v", "--data.classes=c"]


def parse(*arguments):
    return parse_config(list(arguments), "python -m pseudoseg_fast.train", "")


def refusal(capsys, *arguments):
    """What a command line that is refused with status 2 prints."""
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_options_without_a_file():
    config = parse(*DATA, "--method.gamma=0.25", "--data.background=3", "--data.scales=[1, 1.5]")
    assert isinstance(config, Config)
    assert config.data.root == "R"
    assert config.method.gamma == 0.25
    assert config.data.background == 3
    assert config.data.scales == (1.0, 1.5)
    assert config.optim == configuration.OptimConfig()
    assert parse(*DATA, "--data.background=null").data.background is None
    assert parse(*DATA).data.background == "auto"


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_a_round_trip(name, tmp_path):
    config = parse(*DATA, "--data.tags=tags.csv", "--config", name)
    assert from_dict(to_dict(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    assert parse("--config", str(path)) == config


def test_shares_of_the_run_become_steps():
    method = parse(*DATA, "--optim.steps=300", "--method.start_u=0.4", "--method.ramp_u=20").method
    assert (method.start_u, method.ramp_u) == (120, 20)
    assert all(isinstance(steps, int) for steps in (method.start_u, method.ramp_u))
    tagged = ("--config=demo", "--config=tagged")
    assert parse(*tagged).method.start_u == 180
    assert parse(*tagged, "--optim.steps=2000").method.start_u == 1200
    fixmatch = parse(*DATA, "--config=small", "--config=fixmatch")
    assert (fixmatch.optim.steps, fixmatch.method.start_u, fixmatch.method.ramp_u) == (4000, 1200, 100)


def test_untagged_is_tagged_without_tags():
    tagged = parse(
        *(*DATA, "--config=small", "--config=tagged"),
        *("--method.image_labels=false", "--method.exclude_untagged=false"),
    )
    assert parse(*DATA, "--config=small", "--config=untagged") == tagged


def test_every_odd_value_survives_a_round_trip(tmp_path):
    config = parse(
        *DATA,
        "--data.background=null",
        "--data.short_side=96",
        "--data.label_map=1:0,7:255",
        "--data.white=4095",
        "--model.in_channels=1",
        "--model.mean=[0.5]",
        "--model.std=[0.25]",
        '--model.decoder={"decoder_channels": 64, "decoder_atrous_rates": [6, 12, 18]}',
        "--optim.weight_decay=1e-4",
        "--method.class_weight=[0.5, 2]",
        "--run.dir=a folder",
        "--run.precision=bf16-mixed",
    )
    assert config.optim.weight_decay == 0.0001
    assert config.method.class_weight == (0.5, 2.0)
    assert config.model.decoder == {"decoder_channels": 64, "decoder_atrous_rates": [6, 12, 18]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    assert parse("--config", str(path)) == config


@pytest.mark.parametrize("spelling", [["--config", "demo"], ["--config=demo"]], ids=["space", "equals"])
@pytest.mark.parametrize("before", [True, False], ids=["option first", "preset first"])
def test_options_replace_the_presets_wherever_they_stand(spelling, before):
    preset = parse("--config", "demo")
    option = [f"--optim.steps={preset.optim.steps + 1}"]
    config = parse(*option, *spelling) if before else parse(*spelling, *option)
    assert config == dataclasses.replace(
        preset, optim=dataclasses.replace(preset.optim, steps=preset.optim.steps + 1)
    )


def test_a_later_file_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {steps: 7}\n")
    config = parse("--config", "demo", "--config", str(path))
    assert config.optim.steps == 7
    assert config.data == parse("--config", "demo").data


def test_a_file_counts_for_more_than_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text(yaml.safe_dump({"data": {"root": "here"}}))
    assert parse(*DATA[1:], "--config", "demo").data.root == "here"


@pytest.mark.parametrize("before", [["--run.resume"], ["--run.resume", "true"], ["--run.resume", "auto"]])
@pytest.mark.parametrize("after", [[], ["--optim.steps", "3"]], ids=["last", "in between"])
def test_resume_goes_on_with_the_newest_however_it_is_said(before, after):
    assert parse(*DATA, *before, *after).run.resume == "auto"


@pytest.mark.parametrize(("given", "expected"), [("runs/x", "runs/x"), ("false", None), ("null", None)])
def test_resume_takes_a_path_or_nothing(given, expected):
    assert parse(*DATA, f"--run.resume={given}").run.resume == expected


BAD = {
    "nothing given": (
        [],
        ["required: data.root", "--config demo", "--data.root DIR", "--data.unlabeled LIST_OR_DIR"],
    ),
    "unknown layout": ([*DATA, "--data.layout=vok"], ["data.layout", "'voc'", "vok"]),
    "two conversions of labels": (
        [*DATA, "--data.color_map=colors.txt", "--data.reduce_zero_label=true"],
        ["expected masks of colours or of ids, got data.color_map and data.reduce_zero_label"],
    ),
    "white": ([*DATA, "--data.white=0"], ["data.white must be positive, got 0"]),
    "unknown preset": (["--config", "demoo"], ["presets ade20k", "'demoo'", "did you mean 'demo'?"]),
    "unknown preset, other spelling": (["--config=dmo"], ["'dmo'", "did you mean 'demo'?"]),
    "no preset": (["--config"], ["--config: expected one argument"]),
    "forgotten --config": (["demo"], ["unrecognized arguments: demo", "did you mean '--config demo'?"]),
    "unknown option": ([*DATA, "--optim.stepz=3"], ["--optim.stepz", "did you mean '--optim.steps'?"]),
    "unknown group": ([*DATA, "--metod.gamma", "1"], ["--metod.gamma", "did you mean '--method.gamma'?"]),
    "no group": ([*DATA, "--batch_sise", "1"], ["--batch_sise", "did you mean '--optim.batch_size'?"]),
    "abbreviated": ([*DATA, "--optim.step=1"], ["--optim.step=1", "did you mean '--optim.steps'?"]),
    "no number": ([*DATA, "--optim.steps=many"], ["optim.steps", "many"]),
    "unknown method": (
        [*DATA, "--method.name=unimatch"],
        ["method.name", "'pseudoseg', 'supervised'", "unimatch"],
    ),
    "gamma": ([*DATA, "--method.gamma=1.5"], ["method.gamma must be in [0, 1], got 1.5"]),
    "log_every": ([*DATA, "--run.log_every=0"], ["run.log_every must be at least 1 step, got 0"]),
    "keep": ([*DATA, "--run.keep=0"], ["run.keep must be at least 1 checkpoint, got 0"]),
    "mixed pictures with tags": (
        [*DATA, "--method.image_labels=true", "--method.cutmix=0.5"],
        ["method.cutmix mixes pictures", "set method.weight_x to 0, got 1.0"],
    ),
    "no tags": ([*DATA, "--method.image_labels=true"], ["give --data.tags FILE"]),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_command_lines_say_what_to_do(capsys, arguments, expected):
    message = refusal(capsys, *arguments)
    assert message.startswith("python -m pseudoseg_fast.train: error: ")
    assert message.endswith("python -m pseudoseg_fast.train --help lists all options\n")
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {stepz: 3}", "Group 'optim' does not accept option 'stepz'; did you mean '--optim.steps'?"),
        ("optimm: {steps: 3}", "'optimm.steps' is not accepted; did you mean '--optim.steps'?"),
        ("optim: [", "Problems parsing config"),
    ],
    ids=["option", "group", "no YAML"],
)
def test_bad_files_say_what_is_wrong(capsys, tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    assert expected in refusal(capsys, *DATA, "--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no --config: the schedule is the paper's; for tens to hundreds of masks"),
        (["--config", "cpu"], "and there is none: give --config small --config cpu"),
        (["--config=small", "--config=untagged", "--config", "cpu"], None),
        (["--config=cpu", "--config=small"], "--config small, which comes after it, changes it back: give"),
        (["--config=run/config.yaml", "--config", "cpu"], None),
        (["--config", "demo"], None),
        (["--optim.steps", "9"], None),
    ],
)
def test_presets_that_do_not_do_what_they_seem_to_are_told_of(arguments, expected):
    hint = preset_hint([*DATA, *arguments])
    assert hint == expected or expected in hint


def test_presets_that_are_added_to_others_say_so():
    heads = {name: (PRESET_FOLDER / f"{name}.yaml").read_text().split("\n\n")[0][:300] for name in presets()}
    assert sorted(name for name, head in heads.items() if "to be given after" in head.lower()) == [*ADDED]


def test_a_run_that_needs_no_unlabelled_pictures_may_leave_them_out():
    without = [option for option in DATA if "unlabeled" not in option]
    assert parse(*without, "--method.name=supervised").data.unlabeled is None


def test_bad_plain_values_raise_and_do_not_exit():
    values = to_dict(parse("--config", "demo"))
    with pytest.raises(ValueError, match=r"'stepz'; did you mean '--optim.steps'"):
        from_dict(values | {"optim": {"stepz": 3}})
    with pytest.raises(ValueError, match=r"data.root"):
        from_dict(values | {"data": {}})


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for group, options in dataclasses.asdict(parse("--config", "demo")).items():
        assert all(f"--{group}.{name} " in shown for name in options)


def test_gpu_is_another_word_for_cuda_and_what_is_not_supported_is_refused(capsys):
    assert RunConfig(accelerator="gpu").accelerator == "cuda"
    assert choose_accelerator("gpu") == "cuda"
    assert parse_config(["--data.root=R", "--run.accelerator=gpu"], "", "").run.accelerator == "cuda"
    with pytest.raises(SystemExit):
        parse_config(["--data.root=R", "--run.accelerator=mps"], "", "")
    message = capsys.readouterr().err
    assert "run.accelerator" in message
    assert "mps" in message
    with pytest.raises(ValueError, match="accelerator expects one of cpu, cuda, gpu, auto, got 'mps'"):
        choose_accelerator("mps")
