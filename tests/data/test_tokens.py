"""Encoding: the same tokens, whoever did a part of it."""

from pathlib import Path

from tests.conftest import QUICKSTART
from tests.ranks import run_recipe
from tests.small import SMALL_MODEL

FILES = [f"{split}{end}" for split in ("train", "validation") for end in (".bin", ".idx")]


def test_ranks_that_encode_in_turns_write_what_one_writes(prepared: Path, tmp_path: Path) -> None:
    for ranks in (1, 3):
        run = tmp_path / str(ranks)
        run.mkdir()
        for stage in ("corpus", "tokenizer"):
            (run / stage).symlink_to(prepared / stage)
        on_ray = ["cluster.on=ray", f"cluster.ranks_per_node={ranks}"]
        layout = f"stages.pretrain.parallel={{data: {ranks}}}"
        batch = "stages.pretrain.batch={global: 12, micro: 4}"
        recipe = [*SMALL_MODEL, *on_ray, layout, batch]
        run_recipe(QUICKSTART, run, recipe, ["pretrain.tokens"])
    one, three = (tmp_path / str(ranks) / "pretrain" for ranks in (1, 3))
    for file in FILES:
        wrote = (three / "tokens/corpus" / file).read_bytes()
        assert wrote == (one / "tokens/corpus" / file).read_bytes(), file
    assert (three / "tokens/tokens.json").read_text() == (one / "tokens/tokens.json").read_text()
    assert len(list((three / "logs").iterdir())) == 3
