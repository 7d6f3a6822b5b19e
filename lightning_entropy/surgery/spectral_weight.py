"""A weight rescaled to a learned spectral norm, as a torch parametrization that folds back into a plain weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_entropy.functional.spectrum import power_iteration, top_singular_vectors
from lightning_entropy.observe.weight_matrices import MatrixWeight, is_conv1d

_SMALLEST = 1e-30  # a smaller sigma counts as this: a weight that training has made 0 stays 0 and gives no NaN


def in_parts(weight: Tensor, parts: int, transposed: bool = False) -> Tensor:
    """A weight as matrices ``(parts, outputs, inputs)`` in float32 or wider.

    Args:
        weight: ``(outputs, ...)``, or ``(inputs, outputs)`` where ``transposed``.
        parts: in how many equal parts the outputs fall.
        transposed: the outputs are the second axis.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if transposed:
        return wide.unflatten(1, (parts, -1)).permute(1, 2, 0)
    return wide.reshape(parts, wide.shape[0] // parts, -1)


class SpectralWeight(nn.Module):
    r"""The parametrization :math:`\hat W = (\gamma / \sigma(W)) \, W` with :math:`\sigma = u^\top W v`.

    ``gamma`` is a parameter, ``u`` and ``v`` are buffers and constants of the graph, so that the gradient by :math:`W`
    is orthogonal to :math:`W`. All are float32 or wider, and so is what is computed with them. A fused projection has
    one ``gamma``, ``u`` and ``v`` for each of its parts.

    Args:
        weight: the weight, ``(outputs, ...)``, or ``(inputs, outputs)`` for ``Conv1D`` of transformers.
        parts: in how many equal parts its outputs fall.
        transposed: the outputs are the second axis.
        gamma_init: ``"sigma"`` (nothing changes) or ``"one"``.
        order: names of the module's parameters as they were, restored when the weight is folded.
        owner: whose parametrization this is, to be found by :func:`spectral_weights`.
        measured: compute ``u`` and ``v``; False leaves them to be loaded.
    """

    gamma: nn.Parameter
    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        parts: int = 1,
        transposed: bool = False,
        gamma_init: str = "sigma",
        order: tuple[str, ...] = (),
        owner: str = "",
        measured: bool = True,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.transposed = transposed and parts > 1  # one part has the same sigma either way
        self.order = order
        self.owner = owner
        with torch.no_grad():
            matrix = self.matrix(weight)
            if measured:
                u, v = top_singular_vectors(matrix)
            else:
                u, v = (matrix.new_ones(parts, size) for size in matrix.shape[1:])
            self.register_buffer("u", u.contiguous().clone())
            self.register_buffer("v", v.contiguous().clone())
            gamma = self.sigma(weight) if measured and gamma_init == "sigma" else matrix.new_ones(parts)
        self.gamma = nn.Parameter(gamma, requires_grad=weight.requires_grad)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``(parts, outputs, inputs)`` in float32 or wider."""
        return in_parts(weight, self.parts, self.transposed)

    def sigma(self, weight: Tensor) -> Tensor:
        """The spectral norm of each part, ``(parts,)``, differentiable in the weight alone."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self.matrix(weight)
            # Clones: the buffers may move on while a graph that uses them waits for its backward pass. Their length is
            # divided out since an average of models, or a conversion to bfloat16, does not keep it.
            u, v = self.u.to(matrix.dtype, copy=True), self.v.to(matrix.dtype, copy=True)
            length = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(v, dim=-1)
            product = (u * (matrix @ v.unsqueeze(-1)).squeeze(-1)).sum(-1)
            return (product / length).abs().clamp(min=_SMALLEST)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the dtype of the weight."""
        factor = self.gamma / self.sigma(weight)
        if self.parts > 1:
            outputs = weight.shape[1 if self.transposed else 0]
            factor = factor.repeat_interleave(outputs // self.parts)
            if not self.transposed:
                factor = factor.view(-1, *[1] * (weight.dim() - 1))
        return (weight * factor).to(weight.dtype)

    @torch.no_grad()
    def step(self, weight: Tensor) -> None:
        """One power iteration."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self.matrix(weight)
            u, v = power_iteration(matrix, self.u.to(matrix.dtype), self.v.to(matrix.dtype))
        self.u.copy_(u)
        self.v.copy_(v)

    @classmethod
    @torch.no_grad()
    def stored(cls, weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The effective weight from the four tensors of a state dict."""
        parts = gamma.numel()
        transposed = parts > 1 and u.shape[1] * parts != weight.shape[0]
        spectral = cls(weight, parts=parts, transposed=transposed, measured=False).to(gamma)
        spectral.gamma.copy_(gamma)
        spectral.u.copy_(u)
        spectral.v.copy_(v)
        return spectral(weight)

    def extra_repr(self) -> str:
        """The parts, where there are several."""
        return f"parts={self.parts}" if self.parts > 1 else ""


def spectral_weights(
    model: nn.Module, owner: str | None = None
) -> Iterator[tuple[str, nn.Module, str, SpectralWeight]]:
    """Name, module, tensor and parametrization of every rescaled weight, or of one owner's."""
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            first = chain[0]
            if isinstance(first, SpectralWeight) and owner in (None, first.owner):
                yield name, module, tensor, first


def is_rescaled(module: nn.Module, tensor: str) -> bool:
    """Whether a weight carries the parametrization."""
    return parametrize.is_parametrized(module, tensor) and isinstance(
        module.parametrizations[tensor][0],  # type: ignore[index, union-attr]
        SpectralWeight,
    )


def original(module: nn.Module, tensor: str) -> nn.Parameter:
    """The parameter under a parametrized weight."""
    return module.parametrizations[tensor].original  # type: ignore[index, union-attr, return-value]


def rescale(weight: MatrixWeight, *, gamma_init: str, owner: str, parts: int, measured: bool = True) -> SpectralWeight:
    """Put the parametrization onto a weight.

    Args:
        weight: where.
        gamma_init: ``"sigma"`` or ``"one"``.
        owner: see :class:`SpectralWeight`.
        parts: in how many parts.
        measured: see there.

    Returns:
        The parametrization.
    """
    value = weight.module._parameters[weight.tensor]
    assert value is not None
    spectral = SpectralWeight(
        value,
        parts=parts,
        transposed=is_conv1d(weight.module),
        gamma_init=gamma_init,
        order=tuple(weight.module._parameters),
        owner=owner,
        measured=measured,
    )
    _own_class(weight.module)
    # unsafe: torch would evaluate the parametrization once more to check dtype and shape
    parametrize.register_parametrization(weight.module, weight.tensor, spectral, unsafe=True)
    return spectral


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: it shares its class with its deep copies.

    torch keeps the parametrized attribute on the class, so that changing one of them would break the others.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        attributes = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, attributes)


@torch.no_grad()
def unscale(module: nn.Module, tensor: str) -> None:
    """Fold the parametrization: the parameter becomes the effective weight, in the place that it had.

    Raises:
        ValueError: if the weight carries other parametrizations too.
    """
    chain = module.parametrizations[tensor]  # type: ignore[index, union-attr]
    spectral = chain[0]
    if len(chain) > 1 or not isinstance(spectral, SpectralWeight):
        kinds = ", ".join(type(p).__name__ for p in chain)
        raise ValueError(f"{type(module).__name__}.{tensor} carries {kinds}: remove what is on top of it first")
    parameter = original(module, tensor)
    _own_class(module)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    parameter.grad = None  # it was the gradient of the weight before it was rescaled
    for name in spectral.order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


__all__ = ["SpectralWeight", "in_parts", "is_rescaled", "original", "rescale", "spectral_weights", "unscale"]
