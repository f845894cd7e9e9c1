"""The steps of the demo around training; their files lie in ``runs/demo``."""

import shutil
from pathlib import Path

from megatron_bert_tp.data.preprocessing.documents import TextLayout
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.preprocessing.vocabulary_training import train_tokenizer
from megatron_bert_tp.demo.corpus import build_corpus
from megatron_bert_tp.demo.fill_mask import FillMask
from megatron_bert_tp.errors import TrainingError
from megatron_bert_tp.formats.convert import to_huggingface
from megatron_bert_tp.training.curve import draw_loss_curve
from megatron_bert_tp.training.progress import read_records

RUN = Path("runs/demo")
DATA = RUN / "data"
TEXT, VOCABULARY, CORPUS = DATA / "text.txt", DATA / "vocab.txt", DATA / "corpus"
EXPORT, PICTURE, METRICS = RUN / "huggingface", RUN / "loss.png", RUN / "metrics.jsonl"
VOCABULARY_SIZE = 4096
SENTENCES = (
    "If the file does not [MASK], an error is raised.",
    "Return a new [MASK] with the same shape as the input.",
    "The default [MASK] is None.",
    "Return True if the graph is [MASK], otherwise False.",
    "This function is used to [MASK] the value of a tensor.",
)


def make_data() -> None:
    """Corpus text (cached), vocabulary and tokens; what stands and fits is used again."""
    DATA.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(TEXT, workers=2)
    if corpus.is_reused and Path(f"{CORPUS}.json").exists() and VOCABULARY.exists():
        print(f"2/6 and 3/6: {VOCABULARY} and {CORPUS} are used again", flush=True)
        return
    layout = TextLayout(sentence_per_line=True)
    print("\n2/6 vocabulary", flush=True)
    size = train_tokenizer([TEXT], VOCABULARY, size=VOCABULARY_SIZE, layout=layout, overwrite=True)
    print(f"{VOCABULARY}: {size:,} entries\n\n3/6 tokens", flush=True)
    print(preprocess([TEXT], VOCABULARY, CORPUS, layout=layout, overwrite=True), flush=True)


def export() -> None:
    """The newest checkpoint as a Hugging Face directory, in place of an earlier one of the demo."""
    if EXPORT.exists():
        shutil.rmtree(EXPORT)
    print(to_huggingface(RUN, EXPORT))


def fill_masks() -> None:
    """Print what the exported weights put in place of each [MASK]."""
    model = FillMask(EXPORT)
    for sentence in SENTENCES:
        print(f"  {sentence}")
        for words in model.best(sentence, 5):
            print("      " + "  ".join(f"{word} {100 * share:.1f}%" for word, share in words))


def picture() -> None:
    """Draw the loss curve."""
    draw_loss_curve(METRICS, PICTURE, title="MegatronBert on docstrings, tensor 2 x pipeline 2")


def summary() -> str:
    """Where everything is, and how the training ended; TrainingError when it did not beat word frequencies."""
    last = [record for record in read_records(METRICS) if record["kind"] == "evaluation"][-1]
    if float(last["mlm_loss"]) >= float(last["unigram_loss"]):
        raise TrainingError(
            f"{METRICS}: the held-out MLM loss ({last['mlm_loss']:.4f} nats) is not below that of word "
            f"frequencies alone ({last['unigram_loss']:.4f}); train longer or at a lower rate"
        )
    return (
        f"\nheld-out MLM loss {last['mlm_loss']:.4f} nats over {last['masked']:,} masked tokens; "
        f"word frequencies alone give {last['unigram_loss']:.4f}\n"
        f"corpus        {TEXT}\n"
        f"checkpoints   {RUN / 'checkpoints'}\n"
        f"metrics       {METRICS}\n"
        f"loss curve    {PICTURE}\n"
        f"exported      {EXPORT} (transformers.MegatronBertForPreTraining.from_pretrained reads it)"
    )
