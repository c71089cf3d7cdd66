"""Bits go where they are worth most, and what they are worth is what the model says."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmscale.errors import RecipeError
from llmscale.quantization import blocks
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.mixed import Choice, widened
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import Quantization
from llmscale.quantization.sensitivity import Changes, divergences
from tests.quantization.small import TEXT, small_llama

LETTERS = TEXT.read_text(encoding="utf-8")[:8000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("model") / "llama")


def noise(names: list[str], size: float) -> dict[str, Tensor]:
    """A change for each layer of both blocks."""
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    shapes |= {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
    random = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(*shapes[name.split(".")[-1].split("_")[0]], generator=random) * size
        for name in names
    }


def measured(
    model: Path, windows: Tensor, size: float, scratch: Path
) -> tuple[dict[str, tuple[float, float]], dict[str, Tensor]]:
    """What ours says of changes of this size, and of twice it; and the changes."""
    blockwise = BlockwiseModel(model)
    changes = noise(blockwise.names, size)

    def changes_of(block: nn.Module) -> Changes:
        return {name: (change, 2 * change) for name, change in changes.items()}

    return divergences(blockwise, windows, changes_of, scratch), changes


def test_the_divergence_is_that_of_each_tokens_own_gradient(model: Path, tmp_path: Path) -> None:
    """The whole model by autograd, and the same drawn tokens, against one block at a time."""
    windows = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, changes = measured(model, windows, 0.01, tmp_path)

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = dict.fromkeys(ours, 0.0)
    random = torch.Generator().manual_seed(0)
    for window in windows:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            whole.get_submodule(name).register_forward_hook(
                lambda _, given, out, name=name, seen=seen: seen.update({name: (given[0], out)})
            )
            for name in ours
        ]
        logits = whole(window[None]).logits[0]
        drawn = logits.detach().softmax(-1).multinomial(1, generator=random)[:, 0]
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        gradients = torch.autograd.grad(loss, [out for _, out in seen.values()])
        for (name, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
            change = changes[name.split(".", 3)[-1]]
            for token in range(24):
                moved = gradient[0, token] @ (change @ given[0, token].detach())
                expected[name] += float(moved) ** 2 / 2 / windows.numel()
        for hook in hooks:
            hook.remove()

    for name, (once, twice) in ours.items():
        assert once == pytest.approx(expected[name], rel=1e-3), name
        assert twice == pytest.approx(4 * once, rel=1e-3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keeps_all", [False, True])
def test_gradients_of_some_positions_at_a_time_are_those_of_all(
    keeps_all: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    blockwise = BlockwiseModel(model)
    outputs = [torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(n)) for n in (4, 5)]
    whole = blockwise.last_gradients(windows, outputs)
    monkeypatch.setattr(blocks, "LOGITS_AT_ONCE", 5 * blockwise.config.vocab_size)
    if keeps_all:
        forward = blockwise.model.forward
        blockwise.model.forward = lambda logits_to_keep=0, **given: forward(**given)
    parts = blockwise.last_gradients(windows, outputs)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_the_divergence_of_the_last_layer_is_the_one_measured(model: Path, tmp_path: Path) -> None:
    """Its outputs reach no other position, so nothing is left out; tokens drawn are many."""
    windows = torch.randint(5, 300, (64, 64), generator=torch.Generator().manual_seed(2))
    last = "model.layers.1.mlp.down_proj"
    size = 0.02
    total = sum(
        measured(model, part, size, tmp_path)[0][last][0] for part in windows.split(4)
    ) / len(windows.split(4))

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    changes = noise(BlockwiseModel(model).names, size)
    with torch.no_grad():
        before = whole(windows).logits.log_softmax(-1)
        whole.get_parameter(f"{last}.weight").add_(changes["mlp.down_proj"])
        after = whole(windows).logits.log_softmax(-1)
    real = F.kl_div(after, before, reduction="sum", log_target=True) / windows.numel()
    assert total == pytest.approx(float(real), rel=0.15)


def test_bits_go_first_where_each_is_worth_most() -> None:
    first = Choice(("a",), (400, 800), (4.0, 0.0))
    dear = Choice(("b", "c"), (4000, 8000), (8.0, 0.0))
    small = Choice(("d",), (100, 200), (0.5, 0.4))
    choices = [dear, small, first]
    assert [choice.worth for choice in choices] == [0.002, pytest.approx(0.001), 0.01]
    assert widened(choices, 4500) == []
    assert widened(choices, 4600) == ["d"]
    assert widened(choices, 4999) == ["a"] or widened(choices, 4999) == ["d", "a"]
    assert widened(choices, 9000) == ["a", "b", "c", "d"]


def test_the_choice_is_within_the_budget_and_next_to_the_best() -> None:
    random = torch.Generator().manual_seed(3)
    for _ in range(20):
        numbers = torch.rand(10, 2, generator=random).tolist()
        choices = [
            Choice((str(n),), (100 * size, 200 * size), (worse, worse / 100))
            for n, (size, worse) in enumerate(numbers)
        ]
        budget = 1.3 * sum(choice.bits[0] for choice in choices)

        def told(wide: set[str], of: list[Choice] = choices) -> tuple[float, float]:
            picked = [(c.bits[c.names[0] in wide], c.divergences[c.names[0] in wide]) for c in of]
            return sum(bits for bits, _ in picked), sum(worse for _, worse in picked)

        subsets = itertools.chain.from_iterable(
            itertools.combinations([c.names[0] for c in choices], k) for k in range(11)
        )
        best = min(worse for bits, worse in map(told, map(set, subsets)) if bits <= budget)
        bits, worse = told(set(widened(choices, budget)))
        assert bits <= budget
        assert worse <= 1.35 * best


@pytest.mark.parametrize("bits", [4.6, 6.0, 8.0])
def test_a_folder_keeps_its_budget_and_loads_in_both_formats(
    bits: float, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    figures = quantize(model, out, Quantization(scheme="mixed", bits=bits), [LETTERS], tokens=1024)

    assert bits - 0.7 < figures["bits_per_weight"] <= bits
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    named = {group["weights"]["num_bits"]: set(group["targets"]) for group in groups.values()}
    assert set(named) == {4, 8}
    assert named[4] | named[8] == set(BlockwiseModel(model).layers())
    assert not named[4] & named[8]
    for number in (0, 1):
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            own = [n for n in named[8] if f".{number}." in n and n.split(".")[-1] in together]
            assert len(own) in (0, len(together))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def logits(folder: Path) -> Tensor:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return loaded(torch.arange(5, 60)[None]).logits

    assert (logits(out) - logits(model)).norm() / logits(model).norm() < 0.7


def test_a_budget_below_four_bits_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bits: 4\.2 a weight are fewer than the 4\.274 of"):
        quantize(model, tmp_path / "o", Quantization(scheme="mixed", bits=4.2), [LETTERS])
    assert not list(tmp_path.iterdir())
