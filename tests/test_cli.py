"""The command line: from a file to a classifier to labels; exit codes and messages."""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext.cli import main
from xlmr_ext.cli.arguments import with_options
from xlmr_ext.cli.main import COMMANDS, build_parser
from xlmr_ext.threads import available_cpus

COMMAND = [sys.executable, "-m", "xlmr_ext"]
WORDS = {
    "animals": ["fox", "dog", "cat", "brown", "black", "lazy", "jumps", "sleeps"],
    "books": ["Buch", "Geschichte", "Stadt", "gekauft", "neues", "Haus", "lesen", "Seite"],
    "food": ["pain", "lait", "chaud", "table", "cuisine", "matin", "soupe", "pomme"],
}


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) rows whose words tell the label."""
    source = random.Random(seed)
    names = sorted(WORDS)
    return [
        (" ".join(source.choices(WORDS[names[i % 3]], k=source.randint(3, 9))), names[i % 3])
        for i in range(count)
    ]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model without a head in ``base``, and data beside it."""
    from xlmr_ext import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    folder = tmp_path_factory.mktemp("cli")
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(folder))
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        initializer_range=0.1,  # 0.02 is for wide models: this one would learn slowly
    )
    torch.manual_seed(0)
    XLMRobertaModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_csv(folder / "train.csv", sentences(240, 1))
    write_csv(folder / "dev.csv", sentences(45, 2))
    return folder


def recipe(folder: Path, output: Path, *more: str) -> list[str]:
    """A call of finetune that learns the rows."""
    paths = ["--model", folder / "base", "--train", folder / "train.csv", "--output", output]
    rates = ["--learning-rate", "3e-3", "--epochs", "5", "--max-length", "48", "--threads", "1"]
    return ["finetune", *map(str, paths), *rates, *more]


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    """The checkpoint that the installed command made of them."""
    output = files / "trained"
    done = subprocess.run(
        [*COMMAND, *recipe(files, output, "--dev", str(files / "dev.csv"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "240 rows to train, 45 to evaluate, 3 labels (a new classifier head)"
    )
    assert [line.split()[1] for line in lines[1:6]] == [f"{epoch}/5" for epoch in range(1, 6)]
    assert lines[6].startswith("75 steps in ")
    assert lines[7] == f"label texts: xlmr-ext predict --model {output} --input FILE"
    log = json.loads((output / "xlmr_ext_training.json").read_text())
    assert max(epoch["dev_accuracy"] for epoch in log["history"]) >= 0.95
    return output


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], restore_threads: None
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return call


Cli = Callable[..., tuple[int, str, str]]


def test_predict_labels_standard_input_in_order(trained: Path) -> None:
    rows = sentences(120, 3)
    done = subprocess.run(
        [*COMMAND, "predict", "--model", str(trained), "--threads", "1", "--window", "50"],
        input="\n".join(text for text, _ in rows) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["label", "score", "text"]
    assert [line[2] for line in lines] == [text for text, _ in rows]
    right = sum(line[0] == label for line, (_, label) in zip(lines, rows, strict=True))
    assert right >= 0.95 * len(rows)
    assert all(1 / 3 <= float(line[1]) <= 1 for line in lines)


def test_predict_reads_files_one_after_the_other(files: Path, trained: Path, cli: Cli) -> None:
    tsv = files / "more.tsv"
    tsv.write_text("id\tbody\tlabel\n1\tfox dog cat\tanimals\n2\t\tfood\n")
    code, out, err = cli(
        *["predict", "--model", trained, "--input", tsv, tsv, "--format", "jsonl"],
        *["--text-column", "body", "--label-column", "label", "--output", files / "out.jsonl"],
    )
    assert (code, out) == (0, "")
    answers = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == ["fox dog cat", "", "fox dog cat", ""]
    assert answers[0]["label"] == "animals"
    assert answers[0]["scores"].keys() == {"animals", "books", "food"}
    assert answers[0]["score"] == answers[0]["scores"]["animals"]
    assert answers[0] == answers[2]
    assert err.startswith("xlmr-ext: 4 rows, accuracy ")


def test_predict_agrees_with_the_library_and_scores_a_labelled_file(
    files: Path, trained: Path, cli: Cli
) -> None:
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
    from xlmr_ext.data import read_labelled
    from xlmr_ext.prediction import evaluate

    result = evaluate(
        XLMRobertaForSequenceClassification.from_pretrained(trained),
        XLMRobertaTokenizer.from_pretrained(trained),
        read_labelled(files / "dev.csv"),
    )
    code, out, err = cli(
        *["predict", "--model", trained, "--input", files / "dev.csv", "--label-column", "label"]
    )
    assert code == 0
    assert len(out.splitlines()) == 46
    assert err == (
        f"xlmr-ext: 45 rows, accuracy {result.accuracy:.2%}, macro F1 {result.macro_f1:.4f}\n"
    )


def test_odd_texts_come_through(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ["", "a\0b", "\ud800 fox", "tab\there\r\nline", "x" * 100_000, "\ufeff", "\u2028"]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in odd))
    command = ["predict", "--model", trained, "--input", tmp_path / "odd.jsonl"]
    code, out, err = cli(*command, "--format", "jsonl")
    assert (code, err) == (0, "")
    assert [json.loads(line)["text"] for line in out.removesuffix("\n").split("\n")] == odd
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    lines = out.removesuffix("\n").split("\n")
    assert len(lines) == 1 + len(odd)
    assert all(line.count("\t") == 2 for line in lines)
    assert lines[4].endswith("\ttab here  line")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\xff")))
    code, out, err = cli("predict", "--model", trained)
    assert (code, len(out.splitlines())) == (1, 3)
    assert err == (
        "xlmr-ext: error: standard input:3: not UTF-8 (byte 0xff at position 3 of the line); save "
        "the file as UTF-8; the 2 rows before it were written\n"
    )


def test_a_closed_pipe_ends_quietly(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("fox dog cat\n" * 20_000)
    script = (
        f"{sys.executable} -m xlmr_ext predict --model {trained} --input {tmp_path / 'long.txt'} "
        '--threads 1 | head -n 2; echo "${PIPESTATUS[0]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
    assert len(done.stdout.splitlines()) == 3


def test_the_same_command_gives_the_same_weights(files: Path, cli: Cli, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, _, err = cli(*recipe(files, tmp_path / name), "--epochs", 2, "--seed", seed)
        assert code == 0, err
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_training_goes_on_from_a_classifier(
    files: Path, trained: Path, cli: Cli, tmp_path: Path
) -> None:
    few = write_csv(tmp_path / "few.csv", [row for row in sentences(30, 5) if row[1] != "food"])
    call = ["finetune", "--max-length", 48, "--model", trained, "--train", few, "--output"]
    code, out, err = cli(*call, tmp_path / "same", "--epochs", 1)
    assert code == 0, err
    assert out.startswith("20 rows to train, 3 labels (the given classifier head), ")
    new = write_csv(
        tmp_path / "new.csv", [(text, f"not {label}") for text, label in sentences(9, 5)]
    )
    call[6] = new
    code, out, _ = cli(*call, tmp_path / "new", "--epochs", 1)
    assert code == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert set(config["label2id"]) == {"not animals", "not books", "not food"}


def test_a_run_at_chance_warns(files: Path, cli: Cli, tmp_path: Path) -> None:
    rates = ["--learning-rate", "1e-8", "--epochs", "1"]
    code, _, err = cli(*recipe(files, tmp_path, "--dev", str(files / "dev.csv"), *rates))
    assert code == 0
    assert err.startswith("xlmr-ext: warning: training sits at chance after epoch 1: ")
    assert "raise the learning rate (now 1e-08), train for more epochs (now 1)" in err


def test_ctrl_c_says_where_it_stopped(files: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, *recipe(files, tmp_path / "out", "--epochs", "5000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, such as a test run may be, inherits a deaf ear.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        try:
            while not process.stdout.readline().startswith("epoch 2/"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert err.startswith("xlmr-ext: stopped in epoch ")
    assert err.count("\n") == 1
    assert " of 5000, after step " in err
    assert f"of 75000; {tmp_path / 'out'} holds the weights of epoch " in err


def test_a_full_disk_leaves_the_old_checkpoint(files: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    del before["xlmr_ext_training.jsonl"]  # the log of a run as it goes, no part of the checkpoint
    for name, content in before.items():
        (output / name).write_bytes(content)
    done = subprocess.run(
        [*COMMAND, *recipe(files, output, "--epochs", "1")],
        capture_output=True,
        text=True,
        timeout=120,
        # The disk is full, to this process, after 20 kB a file.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"xlmr-ext: error: could not save epoch 1 to {output}: ")
    assert done.stderr.endswith("; what was there before is unchanged\n")
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files.pop("xlmr_ext_training.jsonl").startswith(b'{"event": "start"')
    assert files == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,category\na,b\n", "bad.csv:1: has no column 'label'; its columns are 'text', 'cat"),
        ("text,label\na,b\nc,b\n", "has one class only, 'b'"),
        ("text,label\na,b\nc\n", "bad.csv:3: 1 columns, expected 2"),
        (None, "bad.csv: No such file or directory"),
    ],
)
def test_bad_training_files(
    files: Path, cli: Cli, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_text(content)
    code, out, err = cli(*recipe(files, tmp_path / "out"), "--train", path)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("xlmr-ext: error: ")
    assert message in err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "epoch" not in out


def test_a_dev_label_beyond_the_training_labels(files: Path, cli: Cli, tmp_path: Path) -> None:
    dev = write_csv(tmp_path / "dev.csv", [("fox", "animals"), ("boat", "ships")])
    code, _, err = cli(*recipe(files, tmp_path / "out"), "--dev", dev)
    assert code == 1
    assert f"{dev}:3: label 'ships' is not one of the model's 3 labels: 'animals', 'books'" in err


def test_models_that_will_not_do(files: Path, trained: Path, cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("predict", "--model", files / "base", "--input", files / "train.csv")
    assert code == 1
    assert err.startswith(f"xlmr-ext: error: {files / 'base'} is no trained classifier (make one: ")
    assert "classifier.dense.bias" in err
    code, _, err = cli("predict", "--model", tmp_path, "--input", files / "train.csv")
    assert (code, err.count("\n")) == (1, 1)
    assert "config.json" in err
    code, _, err = cli(*recipe(files, tmp_path / "out"), "--max-length", 65)
    assert code == 1
    assert "--max-length must be from 3 to 64" in err


def test_inputs_are_checked_before_any_work(files: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox\n")
    call = ["predict", "--model", "nowhere", "--input", tmp_path / "a.txt"]
    code, _, err = cli(*call, tmp_path / "b.txt")
    assert (code, err) == (
        1,
        f"xlmr-ext: error: {tmp_path / 'b.txt'}: No such file or directory\n",
    )
    code, _, err = cli(*call, tmp_path, "--input-format", "txt")
    assert (code, err) == (1, f"xlmr-ext: error: {tmp_path}: Is a directory\n")
    code, _, err = cli(*call, "--output", tmp_path / "a.txt")
    assert code == 2
    assert "a.txt is an input, which would be lost" in err
    assert (tmp_path / "a.txt").read_text() == "fox\n"


def test_debug_shows_the_traceback(files: Path, cli: Cli, tmp_path: Path) -> None:
    command = ["predict", "--model", tmp_path, "--input", files / "train.csv"]
    assert "Traceback" not in cli(*command)[2]
    for call in (["--debug", *command], [*command, "--debug"]):
        code, _, err = cli(*call)
        assert code == 1
        assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: xlmr-ext"),
        (["fly"], "invalid choice: 'fly'"),
        (["finetune"], "the following arguments are required: --model, --train, --output"),
        (["predict", "--model", "m", "--threads", "0"], "whole number of at least 1, got '0'"),
        (["predict", "--model", "m", "--batch-size", "x"], "at least 1, got 'x'"),
        (["predict", "--model", "m", "--format", "xml"], "invalid choice: 'xml'"),
        (["predict", "--model", "m", "--input", "a.xlsx"], "suffix '.xlsx'"),
        (["predict", "--model", "m", "--label-column", "x"], "standard input is plain text"),
        (["--seed", "-1", "info"], "from 0 to 2**32 - 1, got '-1'"),
    ]
    + [
        (["finetune", "--model", "m", "--train", "t.csv", "--output", "o", *bad], message)
        for bad, message in [
            (["--learning-rate", "0"], "a number above 0, got '0'"),
            (["--learning-rate", "nan"], "a number above 0, got 'nan'"),
            (["--warmup-ratio", "2"], "a number from 0 to 1, got '2'"),
            (["--weight-decay", "-1"], "a number of 0 or more, got '-1'"),
            (["--dev", "d.xlsx"], "suffix '.xlsx'"),
            (["--input-format", "txt"], "plain text, which has no columns"),
        ]
    ],
)
def test_bad_usage_is_exit_code_2(arguments: list[str], message: str, cli: Cli) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_task_s_options_are_the_same_in_every_command() -> None:
    actions = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for flag in ("--stride", "--token-column", "--doc-stride", "--max-answer-length"):
        found = {
            (action.dest, action.help, action.metavar, action.type, action.default)
            for command in ("finetune", "predict", "eval")
            for action in actions.choices[command]._actions
            if flag in action.option_strings
        }
        assert len(found) == 1, flag


def test_messages_have_the_options_names() -> None:
    arguments = argparse.Namespace(max_length=None, doc_stride=1, template="", labels=[], model="")
    for message, expected in (
        ("max_length must be 3; lower doc_stride", "--max-length must be 3; lower --doc-stride"),
        ("hypothesis_template 'a' has no {}", "--template 'a' has no {}"),
        ("candidate_labels must hold one", "--labels must hold one"),
        # A file's name, a value, a part of a name, an option that the command does not have.
        ("max_length.csv, a/max_length, 'max_length'", None),
        ("errors='repair', batch_size, my_max_length, max_length=3", None),
    ):
        assert with_options(message, arguments) == (expected or message)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete(command: str, cli: Cli) -> None:
    code, out, err = cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "examples:\n  " in out
    parser = build_parser()
    if command:
        actions = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = actions.choices[command]
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action
    assert "==SUPPRESS==" not in out
    assert "(default: None)" not in out
    if command == "finetune":
        assert "the peak, after warm-up (default: 5e-05)" in out


def test_help_and_usage_errors_do_not_import_torch() -> None:
    code = (
        "import sys; from xlmr_ext.cli import main\n"
        "calls = ['--help'], ['finetune', '--help'], ['eval', '--help'], ['--version'], ['x']\n"
        "codes = [main(call) for call in calls]\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'transformers'} & set(sys.modules)\n"
        "print(codes, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0, 2] set()"
    assert "\nxlmr-ext 0." in done.stdout


def test_info_names_the_build(cli: Cli) -> None:
    code, out, err = cli("info", "--threads", 1)
    assert (code, err) == (0, "")
    assert "threads" in out
    code, out, err = cli("--threads", 1, "info", "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    assert (info["threads"], info["threads_by"]) == (1, "--threads")


def test_demo_is_called_with_the_options(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    stand_in = types.ModuleType("xlmr_ext.demo.run")
    stand_in.run_demo = lambda **options: calls.append(options) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xlmr_ext.demo.run", stand_in)
    assert cli("demo", "--output", "d", "--epochs", 2, "--threads", 1, "--seed", 7)[0] == 0
    assert calls == [{"model": None, "output_dir": Path("d"), "seed": 7, "threads": 1, "epochs": 2}]


def test_thread_count_by_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from xlmr_ext.cli.console import threads as _threads

    arguments = build_parser().parse_args(["info"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert _threads(arguments) == (3, "OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert _threads(arguments)[0] == available_cpus()
    assert _threads(build_parser().parse_args(["--threads", "5", "info"])) == (5, "--threads")
