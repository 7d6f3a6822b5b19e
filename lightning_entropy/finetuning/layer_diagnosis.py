r"""Diagnosis of layers before fine-tuning: *Attention Saturation and Gradient Suppression at Inflection Layers*.

arXiv 2511.00797. Of each layer l with output h and attention maps a:

- attention entropy: mean over samples, heads and tokens of ``-sum_s a_s ln a_s``, by default over ``ln(keys)``;
- activation gradient ``G = B sqrt(mean_t |dL/dh_t|^2)`` and its decay through the layer, ``ln G(out) - ln G(in)``;
- parameter gradient ``|grad_theta L|``;
- Delta-CKA, ``1 - CKA`` between two moments in one PCA basis;
- SKI, ``alpha Hn + (1 - alpha) Gn`` of inverse normalised entropy and gradient, whose local maxima are the inflection
  layers; or the intersection of low entropy and steep decay.

What is ours, since the paper does not say: every normalisation, alpha 0.5, thresholds, what a flat profile is, the
treatment of padding, the decay by layer, the number of components, and the debiased estimator.
"""

from __future__ import annotations

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.training.layer_diagnosis import diagnose_layers
from lightning_entropy.training.layer_report import LayerDiagnosis, LayerRow

__all__ = ["InflectionRule", "LayerDiagnosis", "LayerRow", "diagnose_layers"]
