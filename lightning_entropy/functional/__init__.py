"""Mathematics: tensors in, tensors out. Nothing here knows of Lightning or of a module."""

from lightning_entropy.functional.activation_entropy import ActivationEntropy, activation_entropy, spacing_entropy
from lightning_entropy.functional.attention import aem_loss
from lightning_entropy.functional.attention_sink import AttentionSink, attention_sink
from lightning_entropy.functional.crrelu import crrelu
from lightning_entropy.functional.density import Density, Laplace, Logistic, Normal
from lightning_entropy.functional.dot_product_entropy import attention_entropy, sampled_mean
from lightning_entropy.functional.eafo import eafo_correction
from lightning_entropy.functional.empirical_density import EmpiricalDensity
from lightning_entropy.functional.entropy import (
    effective_number,
    effective_number_from_logits,
    entropy,
    entropy_from_logits,
    top_k_entropy_from_logits,
)
from lightning_entropy.functional.entropy_penalty import attention_entropy_penalty
from lightning_entropy.functional.entropy_scaling import entropy_scaling_factor
from lightning_entropy.functional.mixture import Mixture
from lightning_entropy.functional.pushforward import pushforward_entropy
from lightning_entropy.functional.rounding import spread_rounding
from lightning_entropy.functional.softplus_attention import length_scaled_softmax, lssa_attention, lssar_attention
from lightning_entropy.functional.spectrum import (
    attention_entropy_lower_bound,
    power_iteration,
    top_singular_vectors,
)
from lightning_entropy.functional.student_t import StudentT

__all__ = [
    "ActivationEntropy",
    "AttentionSink",
    "Density",
    "EmpiricalDensity",
    "Laplace",
    "Logistic",
    "Mixture",
    "Normal",
    "StudentT",
    "activation_entropy",
    "aem_loss",
    "attention_entropy",
    "attention_entropy_lower_bound",
    "attention_entropy_penalty",
    "attention_sink",
    "crrelu",
    "eafo_correction",
    "effective_number",
    "effective_number_from_logits",
    "entropy",
    "entropy_from_logits",
    "entropy_scaling_factor",
    "length_scaled_softmax",
    "lssa_attention",
    "lssar_attention",
    "power_iteration",
    "pushforward_entropy",
    "sampled_mean",
    "spacing_entropy",
    "spread_rounding",
    "top_k_entropy_from_logits",
    "top_singular_vectors",
]
