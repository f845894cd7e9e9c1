import pytest

from megatron_bert_tp.text.encoder import TextEncoder
from tests.tasks.encoders import encoder_of


@pytest.fixture(scope="module")
def encoder(vocabulary, tmp_path_factory) -> TextEncoder:
    """Of the ``vocabulary`` that a file of tests chooses."""
    return encoder_of(vocabulary, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> TextEncoder:
    return encoder_of("uncased", tmp_path_factory.mktemp("small"))
