"""Samples: what every rank reads is a function of the seed and the step."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from llmscale.data.samples import Samples, rank_places
from llmscale.data.tokenizer import train_tokenizer
from llmscale.data.tokens import TokenStream, encoded, write_tokens

TEXTS = [f"document {n}: " + "so foul and fair a day I have not seen. " * n for n in range(1, 30)]


@given(
    consumed=st.integers(0, 10**6),
    micro=st.integers(1, 4),
    data_ranks=st.integers(1, 4),
    passes=st.integers(1, 5),
)
def test_the_ranks_together_read_the_global_batch_once(
    consumed: int, micro: int, data_ranks: int, passes: int
) -> None:
    global_batch = micro * data_ranks * passes
    read = [
        place
        for rank in range(data_ranks)
        for batch in rank_places(
            consumed=consumed,
            global_batch=global_batch,
            micro_batch=micro,
            data_rank=rank,
            data_ranks=data_ranks,
        )
        for place in batch
    ]
    assert sorted(read) == list(range(consumed, consumed + global_batch))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    tokenizer = train_tokenizer(iter(TEXTS), "bpe", 300)
    write_tokens(encoded(TEXTS, tokenizer), len(tokenizer), prefix)
    return prefix


def test_megatron_reads_the_documents_that_were_written(stream: Path) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), "bpe", 300)
    dataset = IndexedDataset(str(stream))
    assert len(dataset) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        ids = dataset[number].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


def test_an_epoch_reads_every_token_once(stream: Path) -> None:
    samples = Samples(TokenStream(stream), 16, seed=3)
    seen = [samples.number_at(place) for place in range(len(samples))]
    assert sorted(seen) == list(range(len(samples)))
    whole = np.concatenate([samples.window(n)[:-1] for n in range(len(samples))])
    assert whole.tolist() == TokenStream(stream).window(0, len(whole)).tolist()
    second = [samples.number_at(len(samples) + place) for place in range(len(samples))]
    assert second != seen


def test_too_few_tokens_are_refused_with_the_mend(stream: Path) -> None:
    with pytest.raises(ValueError, match="too few for one sample"):
        Samples(TokenStream(stream), 10**6, seed=0)
