"""Mathematics: tensors in, tensors out. Nothing here knows of Lightning or of a module."""

from lightning_entropy.functional.attention import aem_loss
from lightning_entropy.functional.dot_product_entropy import attention_entropy, sampled_mean
from lightning_entropy.functional.entropy import (
    effective_number,
    effective_number_from_logits,
    entropy,
    entropy_from_logits,
    top_k_entropy_from_logits,
)
from lightning_entropy.functional.entropy_penalty import attention_entropy_penalty

__all__ = [
    "aem_loss",
    "attention_entropy",
    "attention_entropy_penalty",
    "effective_number",
    "effective_number_from_logits",
    "entropy",
    "entropy_from_logits",
    "sampled_mean",
    "top_k_entropy_from_logits",
]
