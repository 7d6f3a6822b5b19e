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
from lightning_entropy.surgery.certified_selection import CertifiedSelection, lowest_condition_numbers
from lightning_entropy.surgery.coarse_trace import CannotSplit
from lightning_entropy.surgery.frozen_call import frozen_call
from lightning_entropy.surgery.logit_variance import logit_variance
from lightning_entropy.surgery.lora import inject_lora, lora_modules, merge_lora
from lightning_entropy.surgery.lora_files import adapter_state_dict, save_adapter
from lightning_entropy.surgery.peft_selection import peft_selection
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import ScoredWeight, Selection
from lightning_entropy.surgery.split_backbone import SplitBackbone, split_backbone
from lightning_entropy.surgery.split_classifier import split_classifier
from lightning_entropy.surgery.split_reader import SplitPass, SplitReader
from lightning_entropy.surgery.task_head import task_heads
from lightning_entropy.surgery.trainable import hold_batch_norms, train_only

__all__ = [
    "AttentionCall",
    "AttentionRewrite",
    "CertifiedSelection",
    "CannotSplit",
    "Change",
    "Refusal",
    "ReplacedAttention",
    "ScaledLogits",
    "ScoredWeight",
    "Selection",
    "SplitBackbone",
    "SplitPass",
    "SplitReader",
    "SurgeryReport",
    "adapter_state_dict",
    "attention_modules",
    "frozen_call",
    "hold_batch_norms",
    "inject_lora",
    "logit_variance",
    "lora_modules",
    "lowest_condition_numbers",
    "merge_lora",
    "peft_selection",
    "restore_attention",
    "rewrite_attention",
    "save_adapter",
    "select_modules",
    "split_backbone",
    "split_classifier",
    "task_heads",
    "train_only",
]
