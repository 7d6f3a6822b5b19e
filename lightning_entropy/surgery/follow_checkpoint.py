"""Which weights are rescaled follows the state dict that is loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_entropy.observe.weight_matrices import matrix_weights
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.spectral_weight import SpectralWeight, original, rescale, spectral_weights, unscale

_PARTS = ("0.gamma", "0.u", "0.v")
_LISTED = ".parametrizations."


def stored_weights(state_dict: dict[str, Any], prefix: str = "") -> dict[tuple[str, str], Tensor]:
    """The ``gamma`` of every rescaled weight in a state dict, by module and tensor name."""
    found = {}
    for key in state_dict:
        stem, _, last = key.rpartition(".0.")
        if last == "gamma" and key.startswith(prefix) and all(f"{stem}.{part}" in state_dict for part in _PARTS):
            module, _, tensor = f".{stem[len(prefix) :]}".rpartition(_LISTED)
            if tensor and "." not in tensor:
                found[module[1:], tensor] = state_dict[key]
    return found


def _keys(prefix: str, name: str, tensor: str) -> tuple[str, str]:
    """The keys of a weight: as a plain parameter, and the stem of its parametrization's."""
    owner = f"{prefix}{name}." if name else prefix
    return f"{owner}{tensor}", f"{owner}parametrizations.{tensor}"


class FollowCheckpoint:
    """A load pre-hook of a model whose weights were rescaled.

    Whether a weight could be rescaled depends on its values (zeros cannot), and those of a fresh model need not be
    those of the model that was saved. So: a state dict with rescaled weights decides which are; one without any is
    that of a plain model, and its weights are rescaled anew as they are loaded.

    Args:
        report: kept up to date with what is rescaled.
        owner: of the parametrizations, see :class:`SpectralWeight`.
        gamma_init: for plain weights.
    """

    def __init__(self, report: SurgeryReport, owner: str, gamma_init: str) -> None:
        self.report, self.owner, self.gamma_init = report, owner, gamma_init

    def __call__(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called by ``load_state_dict`` before anything is loaded."""
        self._follow(model, state_dict, prefix)
        gammas = [spectral.gamma.numel() for _, _, _, spectral in spectral_weights(model, self.owner)]
        self.report.added_parameters = sum(gammas)

    def _follow(self, model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        stored = stored_weights(state_dict, prefix)
        mine = {(name, tensor): (module, s) for name, module, tensor, s in spectral_weights(model)}
        if not stored:
            for (name, tensor), (module, spectral) in mine.items():
                if spectral.owner == self.owner:
                    self._take_plain(name, module, tensor, spectral, state_dict, prefix)
            return
        for (name, tensor), (module, spectral) in mine.items():
            gamma = stored.get((name, tensor))
            plain, _ = _keys(prefix, name, tensor)
            if (gamma is None and plain in state_dict) or (gamma is not None and gamma.numel() != spectral.parts):
                unscale(module, tensor)
                self._left(name, tensor, "is not rescaled in the checkpoint that was loaded" if gamma is None else None)
        rescaled = {(name, tensor) for name, _, tensor, _ in spectral_weights(model)}
        absent = {key: gamma for key, gamma in stored.items() if key not in rescaled}
        if not absent:
            return
        for weight in matrix_weights(model, patterns=None, split_qkv=False, owner=self.report.method):
            gamma = absent.get((weight.name, weight.tensor))
            if gamma is not None:
                rescale(weight, gamma_init="one", owner=self.owner, parts=gamma.numel(), measured=False)
                self._joined(weight.name, weight.tensor)

    def _take_plain(
        self, name: str, module: nn.Module, tensor: str, spectral: SpectralWeight, state: dict[str, Any], prefix: str
    ) -> None:
        plain, stem = _keys(prefix, name, tensor)
        value = state.get(plain)
        if value is None or value.shape != original(module, tensor).shape:
            return  # torch names what is missing or has another shape
        if not bool((spectral.matrix(value) != 0).flatten(1).any(1).all()):
            unscale(module, tensor)
            self._left(name, tensor, "is all zeros in the checkpoint that was loaded")
            return
        fresh = SpectralWeight(value, parts=spectral.parts, transposed=spectral.transposed, gamma_init=self.gamma_init)
        state[f"{stem}.original"] = state.pop(plain)
        for part, number in (("gamma", fresh.gamma.detach()), ("u", fresh.u), ("v", fresh.v)):
            state[f"{stem}.0.{part}"] = number

    def _left(self, name: str, tensor: str, reason: str | None) -> None:
        mine = [c for c in self.report.changes if c.module == name and c.what.split()[0] == tensor]
        self.report.changes[:] = [change for change in self.report.changes if change not in mine]
        if reason is not None:
            self.report.refused.append(Refusal(name, f"{tensor} {reason}"))

    def _joined(self, name: str, tensor: str) -> None:
        mine = [r for r in self.report.refused if r.module == name and r.reason.split()[0] == tensor]
        self.report.refused[:] = [refusal for refusal in self.report.refused if refusal not in mine]
        self.report.changes.append(Change(name, f"{tensor} rescaled, as in the checkpoint that was loaded"))


__all__ = ["FollowCheckpoint", "stored_weights"]
