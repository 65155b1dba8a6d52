"""Flags, config files, presets, errors and the `latentflow` command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from latentflow import __version__, cli
from latentflow.config import RunConfig
from latentflow.errors import UserError
from latentflow.utils.flags import flags_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How the weights move."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A program's settings."""

    data: tyro.conf.Positional[str]
    """A folder of images."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where results go."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    ema: bool = True
    device: Literal["cpu", "cuda"] = "cpu"
    cache: Path | None = None
    shift: float | None = None
    names: tuple[str, ...] = ()
    optimiser: Optimiser = Optimiser(learning_rate=2e-3)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1, not {self.count}")


PRESETS = {"tiny": {"count": 2, "optimiser": {"learning-rate": 0.5}}, "bad": {"cuont": 2}}


def parse(*argv: str) -> Settings:
    return cli.parse(Settings, argv, prog="latentflow example", presets=PRESETS)


def write(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def test_flags_are_flat_and_take_both_dashes_and_underscores() -> None:
    flags = "images -o out -n 3 --learning_rate 0.1 --betas 0.5 0.6 --class hat --no-ema --names a b"
    assert parse(*flags.split()) == Settings(
        data="images",
        output="out",
        count=3,
        class_name="hat",
        ema=False,
        names=("a", "b"),
        optimiser=Optimiser(learning_rate=0.1, betas=(0.5, 0.6)),
    )
    assert parse("images", "--learning-rate", "0.1") == parse("images", "--learning_rate=0.1")


def test_an_outer_default_of_a_section_is_kept() -> None:
    assert parse("images") == Settings(data="images")
    assert parse("images").optimiser.learning_rate == 2e-3


def test_precedence_is_defaults_preset_config_flags(tmp_path: Path) -> None:
    config = write(tmp_path, "learning-rate: 0.7\n")
    assert parse("d", "--preset", "tiny").optimiser.learning_rate == 0.5
    assert parse("d", "--preset", "tiny").count == 2
    both = parse("d", "--preset", "tiny", "--config", config)
    assert (both.count, both.optimiser.learning_rate) == (2, 0.7)
    assert parse("d", f"--config={config}", "--learning-rate", "0.9").optimiser.learning_rate == 0.9
    assert parse("--learning-rate", "0.9", "d", "--config", config).optimiser.learning_rate == 0.9


def test_what_flags_and_the_file_set_is_told_from_presets_and_defaults(tmp_path: Path) -> None:
    config = write(tmp_path, "optimiser: {betas: [0.0, 1.0]}\n")
    line = [
        "images",
        "--preset",
        "tiny",
        "--no-ema",
        "--learning_rate=0.1",
        "--class",
        "a",
        "--config",
        config,
    ]
    assert cli.given(Settings, line) == {"ema", "learning_rate", "class", "betas"}
    assert cli.given(Settings, ["images"]) == frozenset()


@pytest.mark.parametrize(
    "text", ["learning_rate: 0.1\nbetas: [0, 1]", "optimiser: {learning-rate: 1e-1, betas: [0.0, 1.0]}"]
)
def test_config_may_be_flat_or_by_section(tmp_path: Path, text: str) -> None:
    settings = parse("d", "--config", write(tmp_path, text))
    assert settings.optimiser == Optimiser(learning_rate=0.1, betas=(0.0, 1.0))


def test_a_section_may_bear_the_name_of_its_field(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Data:
        """Where images are."""

        data: tyro.conf.Positional[str]
        side: int = 64

    program = dataclasses.make_dataclass("Program", [("data", Data)], frozen=True, kw_only=True)
    expected = program(data=Data(data="cats", side=32))
    for text in ("data: cats\nside: 32", "data: {data: cats, side: 32}"):
        assert cli.parse(program, ["--config", write(tmp_path, text)], prog="program") == expected
    cli.write_config(expected, tmp_path / "written.yaml")
    assert cli.parse(program, ["--config", str(tmp_path / "written.yaml")], prog="program") == expected


def test_config_may_hold_the_positional_and_a_flag_may_replace_it(tmp_path: Path) -> None:
    config = write(tmp_path, "data: from-file\nnames: [x, y]\n")
    assert parse("--config", config).data == "from-file"
    assert parse("--config", config, "from-flag").data == "from-flag"
    assert parse("--config", config, "--names", "z").names == ("z",)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(data="None"),
        Settings(data="--odd", output="a: b # c", class_name="emoji 🍎"),
        Settings(data="d", shift=-1.5, cache=Path("/a b"), device="cuda", ema=False),
        Settings(data="d", names=("a", "--b", "3", "a b"), shift=1e-05),
        Settings(data="d", optimiser=Optimiser(learning_rate=1 / 3, betas=(-0.1, 1e-12))),
    ],
)
def test_write_config_round_trips(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "written.yaml"
    cli.write_config(settings, file)
    assert parse("--config", str(file)) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["config.yaml", "learning_rat", "learning_rate"]),
        ("optimiser: {beta: [0, 1]}", ["config.yaml", "optimiser", "betas"]),
        ("count: many", ["config.yaml", "count", "many", "int"]),
        ("device: gpu", ["config.yaml", "device", "gpu", "cuda"]),
        ("learning_rate: 1\nlearning-rate: 2", ["config.yaml", "twice"]),
        ("optimiser: 3", ["config.yaml", "optimiser"]),
        ("- a\n- b", ["config.yaml", "key: value"]),
        ("a: [", ["config.yaml", "YAML"]),
    ],
)
def test_a_wrong_config_names_the_file_and_the_remedy(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse("d", "--config", write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_a_missing_config_and_an_unknown_preset_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse("d", "--config", "nowhere.yaml")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        parse("d", "--preset", "tinny")
    with pytest.raises(UserError, match="Did you mean 'count'"):
        parse("d", "--preset", "bad")


def test_validation_sees_final_values_only(tmp_path: Path) -> None:
    config = write(tmp_path, "count: 0")
    assert parse("d", "--config", config, "-n", "1").count == 1
    with pytest.raises(UserError, match="at least 1"):
        parse("d", "--config", config)


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("d", "--learning-rat", "3")
    assert exit_.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def help_of(*argv: str, capsys: pytest.CaptureFixture[str], config_class: type = RunConfig) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(config_class, argv, prog="latentflow example", presets=PRESETS)
    assert not exit_.value.code
    return " ".join(capsys.readouterr().out.split())


def test_help_of_few_flags_shows_all_with_their_values_and_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of("-h", capsys=capsys, config_class=Settings)
    for words in [
        "usage: latentflow example DATA [flags] A program's settings.",
        "DATA A folder of images.",
        "-o, --output TEXT Where results go.",
        "-n, --count INT (default: 1)",
        "--class TEXT",
        "--no-ema",
        "--device {cpu,cuda} (default: cpu)",
        "--names TEXT ...",
        "--config FILE YAML",
        "--preset {tiny,bad}",
        "--debug Show the whole traceback of an error.",
        "optimiser: How the weights move. --learning-rate FLOAT (default: 0.002) "
        "--betas FLOAT FLOAT (default: 0.9 0.99)",
    ]:
        assert words in text
    assert "--count INT (default: 2)" in help_of(
        "--preset", "tiny", "--help", capsys=capsys, config_class=Settings
    )


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["images", "-o", "run", "--output-dir", "other"], "--output"),
        (["images", "-o", "run", "--rank=4"], "--lora-rank"),
        (["images", "-o", "run", "--pretrained_model_name_or_path", "sd"], "--init-from"),
    ],
)
def test_flags_by_their_names_in_diffusers_name_ours(arguments: list[str], ours: str) -> None:
    with pytest.raises(UserError, match=f"unknown flag {arguments[3].partition('=')[0]}\nHere it is {ours}."):
        cli.parse(RunConfig, arguments, prog="latentflow example")


def test_a_flag_of_several_words_has_some_and_is_given_once() -> None:
    def control(*arguments: str) -> tuple[str, ...]:
        settings = cli.parse(RunConfig, [*arguments, "-o", "run"], prog="latentflow example")
        assert settings.data.data == "images"
        return settings.control.control

    assert control("--control", "image", "labels", "images") == control("images", "--control=image", "labels")
    columns = ["--columns", "image", "photo"]  # which would take DATA, if the words went behind it
    assert control(*columns, "--control", "image", "images") == ("image",)
    for wrong in (["--control"], ["--control", "images"], ["--control="], ["--control", "--masks", "none"]):
        with pytest.raises(UserError, match=r"\A--control( images)?: none of its words follows"):
            control(*wrong, "images")
    with pytest.raises(UserError, match="--control is given twice"):
        control("--control", "image", "--control=labels", "images")


def test_what_a_section_refuses_is_said_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parsed(*arguments: str) -> None:
        cli.parse(RunConfig, ["images", "-o", "run", *arguments], prog="latentflow example")

    with pytest.raises(UserError, match=r"\A--lora-rank is -1\n"):
        parsed("--lora-rank=-1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=r"\A--lora-rank needs peft[^\n]*\npip install"):
        parsed("--lora-rank", "4")
    assert capsys.readouterr() == ("", "")  # no box of tyro's
    with pytest.raises(SystemExit):
        parsed("--lora-rang", "4")
    assert "--lora-rang" in capsys.readouterr().err


def test_adapters_are_merged_before_a_command_that_takes_none() -> None:
    for flag in (["--lora", "hats"], ["--lora=hats"]):
        with pytest.raises(
            UserError, match=r"--lora is no flag .*\n.*latentflow export CHECKPOINT --lora FILE -o"
        ):
            cli.parse(RunConfig, ["images", "-o", "run", *flag], prog="latentflow example")


def test_help_of_many_flags_shows_the_essential_ones_or_a_group_or_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = help_of("--help", capsys=capsys)
    for words in ["DATA A folder", "-o, --output", "data: --resolution INT", "training: --max-train-steps"]:
        assert words in short
    for words in [
        "`latentflow example --help-all`",
        "--help GROUP` with one of: data, fine-tuning, framing,",
    ]:
        assert words in short
    assert "--route-share" not in short
    group = help_of("images", "--help", "routing", capsys=capsys)
    assert (
        "routing: Token routing (TREAD," in group
        and "--route-share FLOAT" in group
        and "--resolution" not in group
    )
    everything = help_of("--help-all", capsys=capsys)
    for flag in flags_of(RunConfig):
        assert flag.help, flag.key
        name = flag.key.replace("_", "-")
        assert f"--{name} " in everything or f"--no-{name} " in everything or flag.positional
    with pytest.raises(UserError, match="did you mean 'routing'"):
        cli.parse(RunConfig, ["--help", "routin"], prog="latentflow example")


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no images in here", "Give a folder."), 2, "Error: no images in here\nGive a folder."),
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            2,
            "Error: No such file or directory: a.png",
        ),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_run_is_short_and_debug_is_long(
    error: BaseException,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: _raise(error))
    assert exit_.value.code == code
    assert capsys.readouterr().err.strip() == words

    monkeypatch.setattr(sys, "argv", ["program", "--debug"])
    with pytest.raises(SystemExit):
        cli.run(lambda: _raise(error))
    assert ("Traceback" in capsys.readouterr().err) == (code == 2)


def test_run_leaves_defects_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: _raise(ZeroDivisionError()))


def latentflow(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latentflow", *args],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_overview_lists_every_program_without_importing_torch() -> None:
    code = "import sys; from latentflow import cli; sys.argv = ['latentflow', '--help']; cli.main(); " + (
        "assert not {'torch', 'tyro', 'diffusers', 'yaml'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # well under one second on an idle machine
    for command, file in cli.programs().items():
        summary = cli._summary(file)
        assert summary, f"{file} has no docstring"
        assert f"{command} " in done.stdout
        assert summary in done.stdout


@pytest.fixture(scope="module")
def light() -> dict[str, dict[str, Any]]:
    """Run every command with ``--help``, a mistyped flag and no checkpoint, in one process that never imports torch."""
    code = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from latentflow import cli
answers = {}
missing = {
    "generate": "hat --checkpoint /none/there",
    "inpaint": "IMAGE IMAGE hat --checkpoint /none/there",
    "edit": "IMAGE hat --from cat --checkpoint /none/there",
    "interpolate": "hat cat --checkpoint /none/there",
    "evaluate": "/none/there shapes -o report.json",
}
for command in cli.programs():
    for flag in ("--help", "--hepl", "missing"):
        if flag == "missing" and command not in missing:
            continue
        words = missing[command].split() if flag == "missing" else [flag]
        sys.argv, out, err = ["latentflow", command, *words], io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
        heavy = sorted({"torch", "numpy", "diffusers", "transformers", "accelerate"} & set(sys.modules))
        answers[f"{command} {flag}"] = [code or 0, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("command", cli.programs())
def test_help_and_mistyped_flags_of_every_command_need_no_torch(command: str, light: dict[str, Any]) -> None:
    code, out, err, heavy = light[f"{command} --help"]
    assert (code, err, heavy) == (0, "", [])
    assert out.startswith(f"usage: latentflow {command} ")
    code, out, err, heavy = light[f"{command} --hepl"]
    assert (code, out, heavy) == (2, "", [])
    assert "--hepl" in err or "Missing" in err


@pytest.mark.parametrize("command", ["generate", "inpaint", "edit", "interpolate", "evaluate"])
def test_a_missing_checkpoint_is_reported_before_torch_is_imported(command, light) -> None:
    code, out, err, heavy = light[f"{command} missing"]
    assert (code, out, heavy) == (2, "", []) and "no folder '/none/there'" in err


def test_the_help_of_a_training_is_short(light: dict[str, Any]) -> None:
    assert len(light["train --help"][1].splitlines()) <= 70
    assert "--no-FLAG" in light["train --help"][1]


def test_h_takes_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("-h", "images")
    assert ended.value.code is None and "usage:" in capsys.readouterr().out


def test_version_and_unknown_command() -> None:
    assert latentflow("--version").stdout == f"latentflow {__version__}\n"
    done = latentflow("evalaute")
    assert done.returncode == 2
    assert "did you mean 'evaluate'" in done.stderr
    assert "Traceback" not in done.stderr


def test_dispatch_runs_the_program_with_the_rest_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "flow.py").write_text('"""Train."""\nimport sys\nprint(__name__, sys.argv[1:])\n')
    monkeypatch.setattr(cli, "_programs_root", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["latentflow", "--debug", "train", "train", "-o", "x"])
    cli.main()
    assert capsys.readouterr().out == "__main__ ['--debug', 'train', '-o', 'x']\n"
