"""Golden answers of the question-answering pipeline of transformers 4.57, which transformers 5 has no more.

Run from the root of the repository, in an environment with the versions that the file it writes names:

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m tests.prediction.make_question_answering_4_57

It writes `question_answering_4_57.json` beside itself.  Weights come from `tests/golden/formula.py`.
"""

import json
import tempfile
from pathlib import Path

import numpy
import tokenizers
import torch
import transformers
from transformers import BertTokenizerFast, MegatronBertConfig, MegatronBertForQuestionAnswering, pipeline

from tests.prediction.answering import QUESTIONS, SIZES, answering_weight
from tests.prediction.texts import VOCABULARIES

OUT = Path(__file__).parent / "question_answering_4_57.json"


def tokenizer_of(name: str) -> BertTokenizerFast:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocab.txt"
        path.write_text("".join(f"{entry}\n" for entry in VOCABULARIES[name]), encoding="utf-8")
        return BertTokenizerFast(
            str(path), do_lower_case=name == "uncased", model_max_length=SIZES["max_position_embeddings"]
        )


def model_of(name: str) -> MegatronBertForQuestionAnswering:
    model = MegatronBertForQuestionAnswering(MegatronBertConfig(vocab_size=len(VOCABULARIES[name]), **SIZES))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(answering_weight(key, tuple(parameter.shape)))
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    answers = {}
    for name in VOCABULARIES:
        ask = pipeline("question-answering", model=model_of(name), tokenizer=tokenizer_of(name), device="cpu")
        answers[name] = [ask(question=q, context=c, **options) for q, c, options in QUESTIONS]
    versions = {each.__name__: each.__version__ for each in (transformers, tokenizers, torch, numpy)}
    content = {"versions": versions, "answers": answers}
    OUT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
