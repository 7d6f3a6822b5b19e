"""What is wrong with a model: measurements, findings, a report."""

from lightning_entropy.recipes.diagnosis.measure import measure
from lightning_entropy.recipes.diagnosis.result import Finding, ModelDiagnosis, Section
from lightning_entropy.recipes.diagnosis.subject import Subject, open_subject

__all__ = ["Finding", "ModelDiagnosis", "Section", "Subject", "measure", "open_subject"]
