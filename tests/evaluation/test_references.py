"""BLEU and ROUGE: as sacrebleu and a hand count them; nothing written is named."""

from pathlib import Path

import pytest
import sacrebleu

from llmscale.errors import RecipeError
from llmscale.evaluation.referenced import Referenced, read_referenced
from llmscale.evaluation.references import reference_figures

RECORDS = [
    Referenced("x.jsonl:1", "p", ("the cat sat on the mat", "a cat was on the mat today")),
    Referenced("x.jsonl:2", "p", ("there is a very small dog in the old house", "a dog is in it")),
    Referenced("x.jsonl:3", "p", ("the sea is blue and wide", "blue is the sea")),
]
WRITTEN = ["the cat sat on a mat", "there is a small dog in the old house", "the sea is wide"]


def test_bleu_is_sacrebleus_of_the_corpus() -> None:
    references = [[one.references[number] for one in RECORDS] for number in range(2)]
    expected = sacrebleu.corpus_bleu(WRITTEN, references).score
    found = reference_figures(RECORDS, WRITTEN, seed=1)
    assert found["bleu"] == pytest.approx(expected)
    low, high = found["bleu_interval"]
    assert low <= found["bleu"] <= high


def test_rouge_is_the_f_measure_counted_by_hand_of_the_nearest_reference() -> None:
    records = [
        Referenced("x.jsonl:1", "p", ("the cat sat", "entirely something else")),
        Referenced("x.jsonl:2", "p", ("one two three four",)),
    ]
    found = reference_figures(records, ["the cat", "four one two"], seed=1)
    # Of words: 2 of 2 and of 3; 3 of 3 and of 4. Of pairs: 1 of 1 and of 2; 1 of 2 and of 3.
    # Longest common sequences: "the cat"; "one two".
    assert found["rouge1"] == pytest.approx((2 * 1 * (2 / 3) / (5 / 3) + 6 / 7) / 2)
    assert found["rouge2"] == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert found["rougel"] == pytest.approx((4 / 5 + 4 / 7) / 2)


def test_an_empty_continuation_is_named_and_not_scored() -> None:
    some = reference_figures(RECORDS, [WRITTEN[0], " \n", WRITTEN[2]], seed=1)
    others = reference_figures([RECORDS[0], RECORDS[2]], [WRITTEN[0], WRITTEN[2]], seed=1)
    assert (some["empty"], some["empty_at"], some["written"]) == (1, ["x.jsonl:2"], 2)
    assert some["bleu"] == others["bleu"] and some["rougel"] == others["rougel"]
    nothing = reference_figures(RECORDS, ["", "", ""], seed=1)
    assert (nothing["empty"], nothing["bleu"], nothing["rouge1"]) == (3, None, None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"}', "missing field: response"),
        ('{"prompt": "", "response": "b"}', "empty prompt"),
        ('{"prompt": "a", "response": " "}', "empty reference"),
        ('{"prompt": "a", "references": []}', "empty reference"),
        ('{"prompt": "a", "references": "b"}', "wrong field: references"),
        ("7", "no JSON object"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"prompt": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(RecipeError) as error:
        read_referenced(file)
    assert str(error.value).startswith(f"{file}:2: {says}")
