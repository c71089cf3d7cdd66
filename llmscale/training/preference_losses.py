"""What is lost on texts that people have judged, each formula by its paper.

Shape legend: p pairs, b texts. Log-probabilities are those of whole answers, summed over tokens.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(better_p: Tensor, worse_p: Tensor, margin_p: Tensor) -> Tensor:
    """A reward model's loss a pair of scores (Touvron et al. 2023, Llama 2, equation 2)."""
    return -logsigmoid(better_p - worse_p - margin_p)


def centering(better_p: Tensor, worse_p: Tensor) -> Tensor:
    """What keeps the mean score at 0 (Eisenstein et al. 2023, section 2)."""
    return (better_p + worse_p).square()


def direct_preference(chosen_p: Tensor, rejected_p: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7).

    Args:
        chosen_p, rejected_p: log ratios of the model's probability to the reference's.
    """
    return -logsigmoid(beta * (chosen_p - rejected_p))


def identity_preference(chosen_p: Tensor, rejected_p: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, equation 17, whose tau is beta).

    Args:
        chosen_p, rejected_p: log ratios as means over the answer's tokens, as the authors
            do and the paper does not say.
    """
    return (chosen_p - rejected_p - 1 / (2 * beta)).square()


def prospect_theory(ratio_b: Tensor, desirable_b: Tensor, kl: Tensor, beta: float) -> Tensor:
    """KTO, before its weights (Ethayarajh et al. 2024, equation 8).

    Args:
        ratio_b: log ratios of the model's probability to the reference's.
        desirable_b: which texts are wanted.
        kl: the reference point, estimated from prompts with others' answers; not learned from.
    """
    gain_b = (ratio_b - kl).where(desirable_b, kl - ratio_b)
    return 1 - (beta * gain_b).sigmoid()
