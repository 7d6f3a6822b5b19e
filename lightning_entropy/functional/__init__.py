"""Mathematics: tensors in, tensors out. Nothing here knows of Lightning or of a module."""

from lightning_entropy.functional.activation_entropy import ActivationEntropy, activation_entropy, spacing_entropy
from lightning_entropy.functional.attention import aem_loss
from lightning_entropy.functional.attention_sink import AttentionSink, attention_sink
from lightning_entropy.functional.bas import (
    BASTerms,
    area_constraint,
    background_activation_ratio,
    bas_loss,
    foreground_region_guidance,
    multi_label_cross_entropy,
)
from lightning_entropy.functional.condition_lower_bound import condition_lower_bound
from lightning_entropy.functional.condition_number import (
    ConditionNumber,
    condition_number,
    condition_of_spectrum,
    expected_condition_number,
    resolvable_condition_number,
)
from lightning_entropy.functional.connected_components import connected_components, largest_component
from lightning_entropy.functional.crrelu import crrelu
from lightning_entropy.functional.deficit_bounds import condition_bounds_of_deficit, deficit_bounds
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
from lightning_entropy.functional.foreground_maps import label_convolution, mean_of_top_classes
from lightning_entropy.functional.gaussian_unit import (
    activation_entropy_bound,
    effective_rank,
    entropy_deficit,
    gaussian_output_entropy,
    log_volume,
    spectral_flatness,
    stable_rank,
)
from lightning_entropy.functional.hide_and_seek import hide_and_seek
from lightning_entropy.functional.inflection import (
    Inflection,
    InflectionRule,
    inflection_layers,
    saturation_gradient_index,
)
from lightning_entropy.functional.likelihood import SummedLikelihood, summed_nll
from lightning_entropy.functional.localization_boxes import (
    ThresholdBoxes,
    boxes_at_thresholds,
    normalize_score_maps,
    protocol_thresholds,
    scale_boxes,
)
from lightning_entropy.functional.localization_scores import (
    best_iou_at_thresholds,
    inclusive_box_iou,
    pixel_average_precision,
    pixel_precision_recall,
    score_histograms,
)
from lightning_entropy.functional.mixture import Mixture
from lightning_entropy.functional.paired_retrieval import RetrievalScores, paired_retrieval
from lightning_entropy.functional.prior_maps import centre_gaussian, whole_image
from lightning_entropy.functional.pushforward import pushforward_entropy
from lightning_entropy.functional.rounding import spread_rounding
from lightning_entropy.functional.similarity import (
    DeltaCKA,
    MinibatchCKA,
    delta_cka,
    linear_cka,
    linear_hsic,
    shared_pca,
)
from lightning_entropy.functional.singular_spectrum import SingularSpectrum, singular_spectrum
from lightning_entropy.functional.softplus_attention import length_scaled_softmax, lssa_attention, lssar_attention
from lightning_entropy.functional.spectrum import (
    attention_entropy_lower_bound,
    power_iteration,
    top_singular_vectors,
)
from lightning_entropy.functional.spectrum_snr import spectrum_snr
from lightning_entropy.functional.student_t import StudentT

__all__ = [
    "ActivationEntropy",
    "AttentionSink",
    "BASTerms",
    "ConditionNumber",
    "DeltaCKA",
    "Density",
    "EmpiricalDensity",
    "Inflection",
    "InflectionRule",
    "Laplace",
    "Logistic",
    "MinibatchCKA",
    "Mixture",
    "Normal",
    "RetrievalScores",
    "SingularSpectrum",
    "StudentT",
    "ThresholdBoxes",
    "SummedLikelihood",
    "activation_entropy",
    "activation_entropy_bound",
    "aem_loss",
    "area_constraint",
    "attention_entropy",
    "attention_entropy_lower_bound",
    "attention_entropy_penalty",
    "attention_sink",
    "background_activation_ratio",
    "bas_loss",
    "best_iou_at_thresholds",
    "boxes_at_thresholds",
    "centre_gaussian",
    "condition_bounds_of_deficit",
    "condition_lower_bound",
    "condition_number",
    "condition_of_spectrum",
    "connected_components",
    "crrelu",
    "deficit_bounds",
    "delta_cka",
    "eafo_correction",
    "effective_number",
    "effective_number_from_logits",
    "effective_rank",
    "entropy",
    "entropy_deficit",
    "entropy_from_logits",
    "entropy_scaling_factor",
    "foreground_region_guidance",
    "expected_condition_number",
    "gaussian_output_entropy",
    "hide_and_seek",
    "inclusive_box_iou",
    "inflection_layers",
    "label_convolution",
    "largest_component",
    "length_scaled_softmax",
    "linear_cka",
    "linear_hsic",
    "log_volume",
    "lssa_attention",
    "lssar_attention",
    "paired_retrieval",
    "mean_of_top_classes",
    "multi_label_cross_entropy",
    "normalize_score_maps",
    "pixel_average_precision",
    "pixel_precision_recall",
    "power_iteration",
    "protocol_thresholds",
    "pushforward_entropy",
    "resolvable_condition_number",
    "sampled_mean",
    "saturation_gradient_index",
    "scale_boxes",
    "score_histograms",
    "shared_pca",
    "singular_spectrum",
    "spacing_entropy",
    "spectral_flatness",
    "spectrum_snr",
    "spread_rounding",
    "stable_rank",
    "summed_nll",
    "top_k_entropy_from_logits",
    "top_singular_vectors",
    "whole_image",
]
