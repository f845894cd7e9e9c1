"""The [MASK]s are filled as `transformers` fills them."""

import pytest
import torch
from transformers import AutoTokenizer, MegatronBertForPreTraining

from megatron_bert_tp.demo.fill_mask import FillMask
from megatron_bert_tp.formats.convert import to_huggingface


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "huggingface"
    to_huggingface(finished_run, out)
    return out


@pytest.mark.parametrize("text", ["w3 w6 [MASK] w12 w15", "[MASK] w9 [MASK]"])
def test_the_likeliest_words_and_shares_are_those_of_transformers(exported, text):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = MegatronBertForPreTraining.from_pretrained(exported).eval()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).prediction_logits[0]
    is_mask = inputs["input_ids"][0] == tokenizer.mask_token_id
    shares, ids = logits[is_mask].softmax(-1).topk(3)
    ours = FillMask(exported).best(text, 3)
    assert [[word for word, _ in row] for row in ours] == [tokenizer.convert_ids_to_tokens(row) for row in ids]
    # Two float32 programs of the same three layers: a few units of 1e-7 of a share below 1.
    assert [share for row in ours for _, share in row] == pytest.approx(shares.flatten().tolist(), abs=1e-5)


def test_the_folder_of_a_run_answers_like_its_export(finished_run, exported):
    text = "w3 w6 [MASK] w12 [MASK]"
    assert FillMask(finished_run).best(text, 4) == FillMask(exported).best(text, 4)
