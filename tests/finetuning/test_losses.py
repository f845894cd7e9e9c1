"""What may be asked of the loss: smoothing, weights of classes; and of the weights: frozen, slower below."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import CrossEntropyLoss

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.model.initialisation import initial_tensor
from tests.faults.runs import tensors_of
from tests.finetuning.features import part_of, tag_names
from tests.finetuning.reference import DEVIATION, SEED, build_model, collate, first_samples
from tests.finetuning.runs import exported, losses_of, name_of, tune
from tests.support import Layout

WIDE = "optimizer.global_batch=16", "optimizer.steps=1", "data.validation=null", "run.evaluate_every=null"
ONE_STEP = (*WIDE, "optimizer.warmup_share=0", "optimizer.clip_norm=0", "optimizer.weight_decay=0")


def first_batch(kind, files):
    """Logits ``[labels, classes]`` and labels of the first step as `transformers` has them, and all labels."""
    names = tag_names(files.train) if kind is Kind.TAGS else ()
    batch = collate(kind, first_samples(kind, files, 16))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = build_model(kind, files, num_tags=len(names))(**batch).logits
    samples = part_of(kind, files, files.train, names).samples
    every = torch.tensor([label for sample in samples for label in np.atleast_1d(sample.label)])
    return logits.flatten(0, -2), labels.flatten(), every[every >= 0]


@pytest.mark.parametrize(
    ("kind", "smoothing", "weights", "layout"),
    [
        (Kind.CLASS, 0.1, None, Layout(data=2)),
        (Kind.CLASS, 0.0, (0.5, 3.0), Layout(data=2)),
        (Kind.CLASS, 0.2, (2.0, 0.25), Layout()),
        (Kind.CLASS, 0.0, "balanced", Layout()),
        (Kind.CHOICE, 0.3, None, Layout()),
        (Kind.TAGS, 0.1, "balanced", Layout(data=2, packing="packed")),
    ],
    ids=name_of,
)
def test_smoothed_and_weighted_losses_are_those_of_torch(
    ranks, files_of, tmp_path, kind, smoothing, weights, layout
):
    files = files_of(kind)
    logits, labels, every = first_batch(kind, files)
    given = [f"task.label_smoothing={smoothing}"]
    if weights == "balanced":
        given.append("task.balanced=true")
        present = np.unique(every)
        weights = np.zeros(logits.shape[-1])  # a class that no word has is never asked for
        weights[present] = compute_class_weight("balanced", classes=present, y=every.numpy())
        weights *= len(present) / len(weights)
    elif weights is not None:
        given.append(f"task.class_weights={list(weights)}")
    # 1e-12: the same float64 sums in another order.
    loss = CrossEntropyLoss(
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64), label_smoothing=smoothing
    )
    if kind is Kind.CHOICE:
        logits = logits.view(len(labels), -1)
    folder = tune(ranks, files.settings, tmp_path / "run", *WIDE, *given, layout=layout)
    assert losses_of(folder) == [pytest.approx(loss(logits, labels).item(), rel=1e-12)]


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2), Layout(tensor=2)], ids=name_of)
@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_layers_stay_and_all_others_learn(ranks, files_of, small_model, tmp_path, frozen, layout):
    """Two layers at pipeline 2: with either number the first stage is frozen wholly."""
    given = "optimizer.precision=float32", "optimizer.steps=4", f"model.frozen_layers={frozen}"
    folder = tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *given, layout=layout)
    start = load_file(small_model / "model.safetensors")
    before = {name: each for name, each in start.items() if "cls." not in name}
    after = exported(folder)
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}
    still = ("bert.embeddings.", *(f"bert.encoder.layer.{number}." for number in range(frozen)))
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith(still), name


def test_a_frozen_run_follows_the_same_losses_at_pipeline_2(ranks, files_of, tmp_path):
    given = "optimizer.steps=6", "model.frozen_layers=1"
    settings = files_of(Kind.TAGS).settings
    losses = [
        losses_of(tune(ranks, settings, tmp_path / name_of(layout), *given, layout=layout))
        for layout in (Layout(), Layout(pipeline=2))
    ]
    # Float64, whose sums a pipeline adds in the same order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=name_of)
def test_layer_decay_shortens_an_sgd_step_by_its_power_at_each_layer(
    ranks, files_of, small_model, tmp_path, layout
):
    """w1 - w0 = -rate x decay^(L - i) x gradient for layer i of L, and decay^(L + 1) for the embeddings."""
    before = {name: each.double() for name, each in load_file(small_model / "model.safetensors").items()}
    for name, shape in (("classifier.weight", (2, 32)), ("classifier.bias", (2,))):
        before[name] = initial_tensor(name, shape, seed=SEED, deviation=DEVIATION).double()
    moves = []
    for decay in (1.0, 0.5):
        given = "optimizer.name=sgd", "optimizer.learning_rate=0.1", f"optimizer.layer_decay={decay}"
        folder = tune(
            ranks, files_of(Kind.CLASS).settings, tmp_path / str(decay), *ONE_STEP, *given, layout=layout
        )
        weights = only_weights(tensors_of(folder, 1))
        moves.append({name: value - before[name] for name, value in weights.items()})
    assert moves[0].keys() == moves[1].keys()
    for name, move in moves[0].items():
        power = 0
        if name.startswith("bert.embeddings."):
            power = 3
        elif name.startswith("bert.encoder.layer."):
            power = 2 - int(name.split(".")[3])
        if not name.endswith("key.bias"):  # its gradient is rounding
            assert move.abs().max() > 0, name
        # What float64 loses in w1 - w0: some 1e-16 of weights up to 2.
        torch.testing.assert_close(moves[1][name], 0.5**power * move, rtol=1e-9, atol=1e-14)


def only_weights(tensors):
    kind = "weight/"
    return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}


def test_balanced_weights_by_hand(ranks, small_model, tmp_path):
    """Of 12 rows 9 are "no": 12 / (2 x 9) and 12 / (2 x 3)."""
    for part, labels in (("train", ["no"] * 9 + ["yes"] * 3), ("dev", ["no", "yes"])):
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([("text", "label"), *((f"film {row}", each) for row, each in enumerate(labels))])
    settings = tmp_path / "task.yaml"
    settings.write_text(
        f"""
model: {{weights: "{small_model}"}}
task: {{name: classification, balanced: true}}
data: {{train: "{tmp_path}/train.csv", validation: "{tmp_path}/dev.csv", sequence_length: 16}}
optimizer: {{global_batch: 12, steps: 1, precision: float64, seed: 7}}
parallel: {{microbatch: 4}}
run: {{directory: "{tmp_path}/unused", device: cpu}}
"""
    )
    balanced, given = (
        losses_of(tune(ranks, settings, tmp_path / name, *more))[0]
        for name, more in (
            ("balanced", ()),
            ("given", ("task.balanced=false", f"task.class_weights=[{12 / 18}, {12 / 6}]")),
        )
    )
    assert balanced == given
