"""`finetune --config`: options from a TOML file, which give way to the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_heads import write_head

from xlmr_ext.cli import main
from xlmr_ext.cli.config_file import with_config
from xlmr_ext.cli.main import build_parser

Cli = Callable[..., tuple[int, str, str]]


def parsed(tmp_path: Path, text: str, *argv: str) -> argparse.Namespace:
    """The arguments of a finetune with this file."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    command = commands.choices["finetune"]
    given = [word.replace("FILE", str(path)) for word in argv]
    return command.parse_args(with_config(command, given))


BASE = 'model = "m"\ntrain = "t.csv"\noutput = "o"\n'


def test_options_of_every_kind(tmp_path: Path) -> None:
    text = f"""{BASE}
learning-rate = 2e-5   # with a dash
batch_size = 4
class-weights = [1, 2.5]
keep_last = true
json = false
task = "tokens"
seed = 7
weight-decay = 0
text-column = "--odd"
"""
    found = parsed(tmp_path, text, "--config", "FILE")
    assert (found.model, found.train, found.output) == ("m", Path("t.csv"), Path("o"))
    assert (found.learning_rate, found.batch_size, found.seed) == (2e-5, 4, 7)
    assert found.class_weights == [1.0, 2.5]
    assert (found.keep_last, found.json, found.task) == (True, False, "tokens")
    assert (found.weight_decay, found.text_column) == (0.0, "--odd")
    assert found.epochs == 5  # the default


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "FILE", "--epochs", "5"],
        ["--epochs", "5", "--config", "FILE"],
        ["--epochs=5", "--config=FILE"],
        ["--conf", "FILE", "--epochs", "5"],
    ],
)
def test_the_command_line_wins(tmp_path: Path, argv: list[str]) -> None:
    """Also where it says what is the default."""
    assert parsed(tmp_path, f"{BASE}epochs = 3", *argv).epochs == 5
    assert parsed(tmp_path, f"{BASE}epochs = 3", "--config", "FILE").epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat = 1",
            "run.toml: there is no option 'learning_rat'; did you mean 'learning-rate'?",
        ),
        ("zzz = 1", "run.toml: there is no option 'zzz'\n"),
        ("config = 'x'", "there is no option 'config'"),
        ("epochs = ", "run.toml: not TOML: "),
        ("epochs = 0", "run.toml: epochs: expected a whole number of at least 1, got '0'"),
        ("epochs = 1.5", "run.toml: epochs: expected a whole number of at least 1, got '1.5'"),
        ("epochs = true", "run.toml: epochs must be a number or a text, got True"),
        ("[recipe]\nepochs = 1", "run.toml: there is no option 'recipe'"),
        ("[epochs]\nn = 1", "run.toml: epochs must be a number or a text, got {'n': 1}"),
        ("class-weights = [[1]]", "class-weights must be a number or a text"),
        ("keep-last = 1", "run.toml: keep-last must be true or false, got 1"),
        (
            "task = 'poetry'",
            "run.toml: task: expected one of classification, tokens, qa, choice, got",
        ),
        ("log-steps = 1\nlog_steps = 2", "'log-steps' and 'log_steps' are the same option"),
        ("epochs = 3", "the following arguments are required: --model, --train, --output"),
    ],
)
def test_what_the_file_cannot_say_is_bad_usage(
    tmp_path: Path, text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert main(["finetune", "--config", str(path)]) == 2
    assert message in capfd.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--config", str(tmp_path / "no.toml")]) == 2
    assert capfd.readouterr().err.endswith("no.toml: No such file or directory\n")
    assert main(["finetune", "--config"]) == 2
    assert "expected one argument" in capfd.readouterr().err


def write_rows(path: Path, count: int) -> Path:
    lines = [f"{('fox dog', 'neues Buch')[n % 2]} {n},{('a', 'b')[n % 2]}" for n in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
def test_a_run_from_a_file_ends_early_resumes_and_refuses(tmp_path: Path, cli: Cli) -> None:
    write_head(tmp_path / "base", "XLMRobertaForSequenceClassification", ["a", "b"])
    write_rows(tmp_path / "train.csv", 24)
    write_rows(tmp_path / "dev.csv", 6)
    settings: dict[str, Any] = {
        "model": tmp_path / "base",
        "train": tmp_path / "train.csv",
        "dev": tmp_path / "dev.csv",
        "output": tmp_path / "out",
        "batch-size": 2,
        "gradient-accumulation-steps": 2,
        "eval-steps": 3,
        "epochs": 2,
        "label-smoothing": 0.1,
        "class-weights": "balanced",
        "keep-last": True,
    }
    config = tmp_path / "run.toml"
    config.write_text(
        "".join(
            f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}\n"
            for key, value in settings.items()
        )
    )
    code, out, err = cli("finetune", "--config", config)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == [f"step {n}" for n in (3, 6, 9, 12)]
    assert lines[5].startswith("12 steps in ")
    assert f"{tmp_path / 'out'} holds the weights of step " in lines[5]
    assert (tmp_path / "out" / "last" / "model.safetensors").exists()
    code, out, err = cli("finetune", "--config", config, "--resume")
    assert code == 0, err
    assert "(the run had already ended)" in out.splitlines()[1]
    code, out, err = cli("finetune", "--config", config, "--resume", "--epochs", 3)
    assert code == 1
    assert f"error: the run in {tmp_path / 'out'} had other settings: epochs 2 (now 3)" in err
    code, _, err = cli("finetune", "--config", config, "--task", "choice")
    assert code == 2
    assert "--label-smoothing is an option of --task classification and tokens" in err
    code, _, err = cli(
        *["finetune", "--model", tmp_path / "base", "--train", tmp_path / "train.csv"],
        *["--output", tmp_path / "x", "--eval-steps", 3],
    )
    assert code == 1
    assert "--eval-steps came without dev" in err
