"""The entry point: files, pipes, exit codes, and the same answers from two processes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.config.task_table import TASKS as FINETUNED
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.predict import main
from megatron_bert_tp.prediction.arguments import parser
from megatron_bert_tp.prediction.tasks import TASKS
from tests.prediction.directories import ENTITIES, named, predict
from tests.prediction.test_predictor import numbers_of, without_numbers
from tests.prediction.texts import LONG, TEXTS
from tests.training.runs import ROOT, start

MODULE = "megatron_bert_tp.predict"
MASKED = "MegatronBertForMaskedLM"


def command(*arguments: object) -> int:
    return run_command(main, usage=parser().format_help(), arguments=[str(each) for each in arguments])


def exit_code(*arguments: object) -> int:
    """Of a command that ends with its own message."""
    try:
        return command(*arguments)
    except SystemExit as error:
        return int(error.code or 0)


def lines_file(folder: Path, lines: list[str]) -> Path:
    path = folder / "lines.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def records_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def masked(directory_of):
    return directory_of(MASKED)


def test_a_file_is_answered_into_a_file(masked, tmp_path):
    texts = [f"{text} [MASK]" for text in TEXTS]
    given, out = lines_file(tmp_path, texts), tmp_path / "out.jsonl"
    assert command(masked, "--task", "fill-mask", "--input", given, "--output", out, "--top", 2, "--batch", 3) == 0
    assert records_of(out.read_text(encoding="utf-8")) == predict(masked, "fill-mask", texts, top=2, batch_size=3)
    assert "東京大学" in out.read_text(encoding="utf-8")


def test_line_ends_and_a_byte_order_mark_are_no_text(masked, tmp_path, capfdbinary):
    (tmp_path / "lines").write_bytes("\ufeffa [MASK]\r\n[MASK] b".encode())
    assert command(masked, "--task", "fill-mask", "--input", tmp_path / "lines") == 0
    texts = [json.loads(line)["text"] for line in capfdbinary.readouterr().out.splitlines()]
    assert texts == ["a [MASK]", "[MASK] b"]


def test_bad_lines_end_with_the_code_of_bad_data_and_their_number(masked, tmp_path, capfd):
    given = lines_file(tmp_path, ["a [MASK]", "", "none", "[MASK]"])
    assert exit_code(masked, "--task", "fill-mask", "--input", given) == ExitCode.BAD_DATA
    told = capfd.readouterr()
    assert ["error" in record for record in records_of(told.out)] == [False, True, True, False]
    assert told.err == (
        "error: 2 of 4 lines could not be answered, and all others are; the first is line 2: the line is empty; "
        'give a text or {"text": "..."}\n'
    )


def test_no_line_is_no_answer(masked, tmp_path, capfd):
    assert command(masked, "--task", "fill-mask", "--input", lines_file(tmp_path, [])) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("ner", "ner needs a MegatronBertForTokenClassification, and this is a MegatronBertForMaskedLM"),
        ("nothing", "'nothing' is no task; choose fill-mask, next-sentence, classification, ner, "),
        ("squad", "'squad' is a task of finetune; what has learned it is asked with --task question-answering"),
        ("fill-mask --pooling mean", "--pooling is for features, not for fill-mask; leave it out"),
        ("ner --top 3", "--top is for fill-mask, classification, question-answering, not for ner"),
        ("fill-mask --tensor 2", "--tensor is 2, but 1 process runs; start torchrun --nproc_per_node=2"),
        ("fill-mask --batch 0", "'0' is not a whole number from 1 on"),
        ("fill-mask --input nowhere.txt", "nowhere.txt: No such file or directory; check the path"),
        ("fill-mask --output nowhere/out", "nowhere/out: No such file or directory; check the path"),
        (f"fill-mask --input {__file__} --output {__file__}", "is the input, which would be lost"),
    ],
)
def test_wrong_arguments_are_told(masked, capfd, arguments, told):
    code = ExitCode.BAD_DATA if "No such file" in told else ExitCode.BAD_SETTINGS
    assert exit_code(masked, "--task", *arguments.split()) == code
    error = capfd.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", sorted(FINETUNED.keys() - TASKS))
def test_a_task_of_finetune_is_answered_with_the_task_of_the_same_class(name, capsys):
    assert exit_code("model", "--task", name) == ExitCode.BAD_SETTINGS
    (meant,) = re.findall(r"asked with --task (\S+)$", capsys.readouterr().err, flags=re.MULTILINE)
    assert TASKS[meant].classes == (FINETUNED[name].architecture,)


@pytest.mark.parametrize("name", ["lines.csv", "lines.TSV"])
def test_a_table_is_refused_with_what_to_give(masked, tmp_path, capfd, name):
    """Its header would be answered as a text."""
    path = tmp_path / name
    path.write_text("text,label\na [MASK],1\n", encoding="utf-8")
    assert exit_code(masked, "--task", "fill-mask", "--input", path) == ExitCode.BAD_DATA
    told = capfd.readouterr()
    assert told.out == ""
    assert f"{path}: a {path.suffix} file is a table" in told.err
    assert 'give a text or {"text": "..."}, one a line' in told.err


def test_a_stride_beyond_the_window_is_told(directory_of, tmp_path, capfd):
    directory, given = directory_of("MegatronBertForQuestionAnswering"), lines_file(tmp_path, ["who?\tthe river"])
    options = ["--task", "question-answering", "--input", given, "--max-seq-len", 20, "--doc-stride", 30]
    assert exit_code(directory, *options) == 2
    assert "--doc-stride (30) is more than the window (20 tokens)" in capfd.readouterr().err


def test_a_path_without_a_model_is_told(tmp_path, capfd):
    assert exit_code(tmp_path / "nothing", "--task", "features") == ExitCode.BAD_CHECKPOINT
    assert str(tmp_path / "nothing") in capfd.readouterr().err


def test_a_pipe_gets_each_batch_before_the_next_is_asked(masked):
    """Standard input stays open; and a reader that leaves ends the command without a traceback."""
    done = [sys.executable, "-m", MODULE, str(masked), "--task", "fill-mask", "--batch", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        done, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for number in range(2):
            process.stdin.write(f"é{number} [MASK]\nb{number} [MASK]\n".encode())
            process.stdin.flush()
            texts = [json.loads(process.stdout.readline())["text"] for _ in range(2)]
            assert texts == [f"é{number} [MASK]", f"b{number} [MASK]"]
        process.stdout.close()
        process.stdin.write(b"c [MASK]\n")
        process.stdin.close()
        told = process.stderr.read().decode()
        assert process.wait(60) == ExitCode.BAD_DATA
    assert told == "error: nobody reads the output any more; what was read is whole\n"


def shell(line: str, *, folder: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """A command line as it is typed, in ``folder``; ``$predict`` is the fill-mask of ``model``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "model": str(model)}
    environment["python"] = sys.executable
    predict_it = f'"$python" -m {MODULE} "$model" --task fill-mask'
    return subprocess.run(
        ["sh", "-c", line.replace("PREDICT", predict_it)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "PREDICT --output lines.txt < lines.txt",
        "PREDICT --input lines.txt --output link",
        "PREDICT --output hard < lines.txt",
        "PREDICT --input lines.txt >> lines.txt",
        "PREDICT < lines.txt >> link",
    ],
)
def test_the_input_is_never_written_over(masked, tmp_path, line):
    given = lines_file(tmp_path, ["a [MASK]"])
    (tmp_path / "link").symlink_to(given)
    (tmp_path / "hard").hardlink_to(given)
    done = shell(line, folder=tmp_path, model=masked)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is the input, which would be lost; give another --output" in done.stderr
    assert given.read_text() == "a [MASK]\n"


def test_an_input_that_the_shell_has_emptied_is_told(masked, tmp_path):
    lines_file(tmp_path, ["a [MASK]"])
    done = shell("PREDICT --input lines.txt > lines.txt", folder=tmp_path, model=masked)
    assert done.returncode == 2
    assert "the standard output: is the input" in done.stderr


def test_one_device_may_be_read_and_written(masked, tmp_path):
    done = shell("PREDICT < /dev/null > /dev/null", folder=tmp_path, model=masked)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("PREDICT <&-", "error: the standard input is closed; give --input, or lines by a pipe\n"),
        ("PREDICT --input lines.txt >&-", "error: the standard output is closed; give --output\n"),
        ("PREDICT < lines.txt >&-", "error: the standard output is closed; give --output\n"),
    ],
)
def test_a_closed_stream_is_told(masked, tmp_path, line, told):
    lines_file(tmp_path, ["a [MASK]"])
    done = shell(line, folder=tmp_path, model=masked)
    assert (done.returncode, done.stderr) == (2, told)


def test_files_need_no_streams(masked, tmp_path):
    lines_file(tmp_path, ["a [MASK]"])
    done = shell("PREDICT --input lines.txt --output out <&- >&-", folder=tmp_path, model=masked)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(records_of((tmp_path / "out").read_text())) == 1


def test_a_gpu_that_is_not_there_is_told_by_the_option(masked, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert exit_code(masked, "--task", "fill-mask", "--device", "cuda") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --device is cuda, but local rank 0 has no GPU of its own")
    assert error.endswith("or set --device=cpu\n")


def test_two_processes_give_the_answers_of_one(directory_of, tmp_path):
    directory = directory_of("MegatronBertForTokenClassification", "cased", **named(*ENTITIES))
    texts = [*TEXTS, "", LONG]
    given, out = lines_file(tmp_path, texts), tmp_path / "out.jsonl"
    options = ["--task", "ner", "--input", given, "--output", out, "--batch", 2, "--dtype", "float64"]
    done = start(MODULE, directory, *options, "--tensor", 2, processes=2)
    assert done.returncode == 1, "torchrun's own code for a rank that ended with 3"
    assert done.stderr.count("error: 1 of 9 lines could not be answered") == 1, done.stderr
    found = records_of(out.read_text(encoding="utf-8"))
    alone = predict(directory, "ner", texts)
    assert without_numbers(found) == without_numbers(alone)
    assert numbers_of(found) == pytest.approx(numbers_of(alone), abs=1e-5)  # float64 there, float32 here
    assert sum(len(record.get("entities", [])) for record in found) > 20


def test_help_names_every_task_and_needs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert command("--help") == 0
    assert "question-answering  the answer to a question" in capsys.readouterr().out
