"""Whatever a user's file holds, reading it unpickles nothing and starts no program."""

import json

import pytest

from tests.formats.megatron.audit import Event, audited

RUNNING = {
    "pickle.find_class", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.startfile",
    "subprocess.Popen",
}  # fmt: skip
# Imports come first: libraries may do at their import what they like. Making a folder marks the begin and the end.
PROGRAM = """
import os, sys
from pathlib import Path
import torch.distributed, safetensors.torch, tokenizers, rich.console, torch._dynamo
from megatron_bert_tp import check_data, convert, outcome, predict, pretrain
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DirectoryError, MegatronBertError
from megatron_bert_tp.formats.inspect import describe
from megatron_bert_tp.reliability.lock import DirectoryLock
from megatron_bert_tp.training import pretraining
from megatron_bert_tp.training.progress import read_records

folder, settings = Path(sys.argv[1]), sys.argv[2]
run, exported, second = (folder / name for name in ("run", "exported", "second"))
(folder / "schedule").write_text("placement: straight\\nmicrobatches: 4\\nrank 0: F0 B0 F1 B1 F2 B2 F3 B3\\n")
own = ["parallel.schedule=file", f"parallel.schedule_file={folder}/schedule", "optimizer.warmup_steps=0"]

def trained(directory, steps, *more):
    given = [settings, f"run.directory={directory}", f"optimizer.steps={steps}", *own, *more]
    code = pretrain.main(given)
    assert not code, code
    return given

os.mkdir(folder / "begin")
trained(run, 1)
given = trained(run, 2, "run.allow_changes=true")
assert [row["step"] for row in read_records(run / "metrics.jsonl") if row["kind"] == "step"] == [1, 2]
assert outcome.main(given) == 0
assert convert.main(["to-hf", str(run), str(exported)]) in (None, 0)
weights = exported / "model.safetensors"
weights.rename(exported / "model-00001-of-00001.safetensors")
with safetensors.safe_open(exported / "model-00001-of-00001.safetensors", "pt") as file:
    names = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
import json
(exported / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
Tokenizer.load(exported / "tokenizer.json", lowercase=True)
trained(second, 1, f"model.weights={exported}")
for path in (run, exported):
    print(*describe(path, list_tensors=True), sep="\\n")
assert check_data.main([settings.replace("config.yaml", "corpus")]) in (None, 0)
with DirectoryLock(run):
    try:
        DirectoryLock(run).__enter__()
    except DirectoryError as error:
        print(error)
os.mkdir(folder / "end")
"""
CONTROL = """
import os, pickle, sys
from pathlib import Path
os.mkdir(Path(sys.argv[1]) / "begin")
pickle.loads(pickle.dumps(Path))
os.system("true")
os.mkdir(Path(sys.argv[1]) / "end")
"""


def ran(events: list[Event]) -> list[Event]:
    """What was unpickled or started between the two marks."""
    marks = [
        place
        for place, event in enumerate(events)
        if event.name == "os.mkdir" and ("/begin'" in event.what or "/end'" in event.what)
    ]
    assert len(marks) == 2
    return [event for event in events[marks[0] : marks[1]] if event.name in RUNNING]


def test_training_exporting_and_inspecting_unpickle_nothing_and_start_nothing(data, tmp_path):
    output, events = audited(tmp_path / "audit", PROGRAM, str(tmp_path), str(data))
    assert ran(events) == []
    # Guards the test: all kinds of files have been read.
    assert "belongs to another job" in output
    for name in ("run/lock", "run/exit.json", "run/metrics.jsonl", "exported/config.json", "second/exit.json"):
        assert (tmp_path / name).exists(), name
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["outcome"] == "finished"


@pytest.mark.parametrize("name", ["pickle.find_class", "os.system"])
def test_the_audit_sees_what_it_is_there_for(tmp_path, name):
    _, events = audited(tmp_path / "audit", CONTROL, str(tmp_path))
    assert name in {event.name for event in ran(events)}
