"""Rewrites any module, and says in a report what it did and how to take it back. Nothing here knows of Lightning."""

from lightning_entropy.surgery.attention_call import (
    AttentionCall,
    AttentionRewrite,
    ReplacedAttention,
    ScaledLogits,
    restore_attention,
    rewrite_attention,
)
from lightning_entropy.surgery.attention_modules import attention_modules
from lightning_entropy.surgery.logit_variance import logit_variance
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport

__all__ = [
    "AttentionCall",
    "AttentionRewrite",
    "Change",
    "Refusal",
    "ReplacedAttention",
    "ScaledLogits",
    "SurgeryReport",
    "attention_modules",
    "logit_variance",
    "restore_attention",
    "rewrite_attention",
]
