r"""Entropy-preserving attention scaling for another resolution (arXiv 2306.08645).

A model trained with T tokens that runs with N spreads its attention differently. The logits are multiplied by

    c = sqrt(ln N / ln T)          mode "paper"
    c = ln N / ln T                mode "log"
    c = sqrt(1 + 2 ln(N / T) / v)  mode "absolute", v the variance of the logits over the keys

For Gaussian logits of variance v the entropy is ln N - v / 2: the paper's factor keeps H / ln N, the absolute one keeps
H itself (both derivations are ours; the paper gives the first formula). N is counted in each call, T is given or
follows from the ratio of the areas. Self-attention only: the keys of cross-attention are the text, of one length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import TracebackType

import torch
from torch import nn

from lightning_entropy.attention.input_area import InputArea
from lightning_entropy.surgery.attention_call import AttentionCall, ScaledLogits, rewrite_attention
