"""The trainer learns: far below what word frequencies alone can reach, on documents that it has not seen."""

from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.evaluation import HeldOut
from megatron_bert_tp.training.texts import open_texts
from tests.support import CPU
from tests.training.runs import make_data

# One layer, which can look at both neighbours; 250 steps take three seconds.
OVERRIDES = [
    "model.num_hidden_layers=1", "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0",
    "optimizer.steps=250", "optimizer.warmup_steps=20", "optimizer.global_batch=32", "parallel.microbatch=32",
    "run.evaluation_samples=256",
]  # fmt: skip


def test_a_small_model_learns_words_that_follow_a_rule(tmp_path):
    config = load_config(make_data(tmp_path, num_documents=200), OVERRIDES)
    mesh = ParallelMesh.alone()
    texts = open_texts(config, mesh.data, say=print)
    trainer = build_pretrainer(config, mesh, texts, agreement=Agreement.alone(), device=CPU)
    assert texts.validation is not None
    bar = texts.unigram_loss(texts.validation.evaluation(config.run.evaluation_samples))
    # 94 words that are nearly equally frequent: ln(94) = 4.54 nats; an untrained model is no better.
    assert 4.4 < bar < 4.7
    samples, steps = config.run.evaluation_samples, config.optimizer.steps
    held_out = HeldOut(texts, num_samples=samples, every=steps, last_step=steps)
    assert held_out.losses(trainer)[0].mlm_loss > bar - 0.1
    for _ in range(config.optimizer.steps):
        trainer.train_step()
    # It ends near 2.2 nats; one that ignores the neighbours stays at the bar.
    assert held_out.losses(trainer)[0].mlm_loss < bar - 1.5
