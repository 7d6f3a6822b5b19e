"""Methods on attention."""

from lightning_entropy.attention.aem import AttentionEntropyMaximization
from lightning_entropy.attention.entropy_guided_surgery import (
    EntropyGuidedSurgery,
    fuse_linear_ffn,
    remove_layer_norm,
    scale_ffn,
)
from lightning_entropy.attention.entropy_monitor import AttentionEntropyMonitor
from lightning_entropy.attention.entropy_regularizer import AttentionEntropyRegularizer
from lightning_entropy.attention.entropy_report import attention_entropy_report
from lightning_entropy.attention.entropy_scaling import AttentionEntropyScaling, EntropyScalingReport, scale_attention
from lightning_entropy.attention.learnable_temperature import (
    LearnableTemperature,
    add_learnable_temperature,
    temperatures,
)
from lightning_entropy.attention.sigma_reparam import (
    SigmaReparam,
    fold_sigma,
    folded_state_dict,
    sigma_reparametrize,
    update_sigma,
)
from lightning_entropy.attention.softplus_attention import (
    SoftplusAttention,
    register_softplus_attention,
    use_softplus_attention,
)

__all__ = [
    "AttentionEntropyMaximization",
    "AttentionEntropyMonitor",
    "AttentionEntropyRegularizer",
    "AttentionEntropyScaling",
    "EntropyGuidedSurgery",
    "EntropyScalingReport",
    "LearnableTemperature",
    "SigmaReparam",
    "SoftplusAttention",
    "add_learnable_temperature",
    "attention_entropy_report",
    "fold_sigma",
    "folded_state_dict",
    "fuse_linear_ffn",
    "register_softplus_attention",
    "remove_layer_norm",
    "scale_attention",
    "scale_ffn",
    "sigma_reparametrize",
    "temperatures",
    "update_sigma",
    "use_softplus_attention",
]
