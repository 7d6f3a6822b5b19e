"""Spectral norms, and the entropy that an attention row with logits of bounded norm must have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = 1024  # Gram matrices up to this size are decomposed; of larger ones a Krylov space is searched
_STEPS = 96


def attention_entropy_lower_bound(norm: Tensor | float, keys: Tensor | int) -> Tensor:
    r"""The least entropy of a softmax over ``keys`` logits whose l2 norm is at most ``norm``, in nats.

    With :math:`T` keys and :math:`\beta = \exp(-r \sqrt{T / (T-1)})`:

    .. math:: H \ge \log(1 + (T-1) \beta) + r \sqrt{T (T-1)} \, \frac{\beta}{1 + (T-1) \beta}

    The bound is attained, by the logits :math:`r (\sqrt{(T-1)/T}, -1/\sqrt{T(T-1)}, \ldots)`, and falls in *r*. A
    softmax does not change when its logits are shifted, so ``(s - s.mean(-1, keepdim=True)).norm(dim=-1)`` is a valid
    ``norm`` and gives the tightest bound for a row *s*. The paper takes
    :math:`r = \lVert W_K W_Q^\top \rVert_2 \lVert X X^\top \rVert_2`, without :math:`1/\sqrt d`: multiply by the scale
    of the logits where the model has one.

    Args:
        norm: :math:`r \ge 0`, a number or a tensor of any shape; infinity gives 0.
        keys: :math:`T`, a number or a tensor that broadcasts with ``norm``. 0 for fewer than two keys.

    Returns:
        The bound in float32 or wider (float64 for two numbers), of the broadcast shape; differentiable in ``norm``.

    Raises:
        ValueError: if a number is negative or not a number.

    Reference:
        Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296, theorem 3.1.

    Example:
        >>> attention_entropy_lower_bound(0.0, 4)
        tensor(1.3863, dtype=torch.float64)
    """
    if isinstance(norm, int | float) and not norm >= 0:
        raise ValueError(f"norm must be >= 0, got {norm}")
    if isinstance(keys, int) and keys < 0:
        raise ValueError(f"keys must be >= 0, got {keys}")
    if isinstance(norm, Tensor):
        r = norm.to(torch.promote_types(norm.dtype, torch.float32))
        t = torch.as_tensor(keys, dtype=r.dtype, device=r.device)
    else:
        device = keys.device if isinstance(keys, Tensor) else None
        t = torch.as_tensor(keys, dtype=torch.float64, device=device)
        r = torch.as_tensor(norm, dtype=torch.float64, device=device)
    several = t > 1
    t = torch.where(several, t, 2.0)
    # With x = r sqrt(T/(T-1)) and z = log(T-1) - x the bound is softplus(z) + x sigmoid(z): nothing can overflow. Above
    # the clamp it is 0, and infinity would make it 0 times infinity.
    x = (r * (t / (t - 1)).sqrt()).clamp(max=1e4)
    z = (t - 1).log() - x
    return torch.where(several, F.softplus(z) + x * torch.sigmoid(z), 0.0)


def power_iteration(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step towards the top singular vectors: :math:`v = W^\top u / |\cdot|`, then :math:`u = W v / |\cdot|`.

    Args:
        matrix: ``(..., rows, columns)``.
        u: ``(..., rows)``.
        v: ``(..., columns)``.

    Returns:
        The new ``u`` and ``v``; what would be divided by 0 or is not finite stays as it was.

    Example:
        >>> u, v = power_iteration(torch.diag(torch.tensor([2.0, 1.0])), torch.ones(2), torch.ones(2))
        >>> u
        tensor([0.9701, 0.2425])
    """
    v = _direction((matrix.mT @ u.unsqueeze(-1)).squeeze(-1), v)
    return _direction((matrix @ v.unsqueeze(-1)).squeeze(-1), u), v


def _direction(vector: Tensor, otherwise: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    usable = (norm > 0) & torch.isfinite(norm)
    return torch.where(usable, vector / norm, otherwise)


@torch.no_grad()
def top_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors of the largest singular value.

    From the eigenvectors of the smaller Gram matrix where that has up to 1,024 rows; larger ones get 96 Lanczos steps
    with full reorthogonalisation from a fixed start, so that no random state is used and equal matrices give equal
    vectors. The singular value, quadratic in the error of its vectors, is exact to rounding (1e-6 at most).

    Args:
        matrix: ``(..., rows, columns)``, finite, not zero, float32 or float64.

    Returns:
        Unit vectors ``u``, ``(..., rows)``, and ``v``, ``(..., columns)``, with ``u @ matrix @ v`` the spectral norm.

    Example:
        >>> matrix = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> u, v = top_singular_vectors(matrix)
        >>> float(u @ matrix @ v)
        3.0
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        v, u = top_singular_vectors(matrix.mT)
        return u, v
    # Scaled, so that the squares of small or large numbers neither vanish nor overflow.
    scaled = matrix / matrix.abs().amax((-2, -1), keepdim=True)
    if matrix.shape[-1] <= _EXACT:
        v = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[..., -1]
    else:
        v = torch.stack([_lanczos(m) for m in scaled.flatten(0, -3)]) if matrix.dim() > 2 else _lanczos(scaled)
        v = v.unflatten(0, matrix.shape[:-2]) if matrix.dim() > 2 else v
    u = (scaled @ v.unsqueeze(-1)).squeeze(-1)
    return F.normalize(u, dim=-1), v


def _lanczos(matrix: Tensor) -> Tensor:
    """The top eigenvector of ``matrix.T @ matrix``, ``(columns,)``."""
    size = matrix.shape[1]
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = matrix.new_zeros(_STEPS, size)
    tridiagonal = matrix.new_zeros(_STEPS, _STEPS)
    vector = F.normalize(start, dim=0)
    taken = 0
    for j in range(_STEPS):
        basis[j] = vector
        taken = j + 1
        product = matrix.mT @ (matrix @ vector)
        tridiagonal[j, j] = product @ vector
        for _ in range(2):  # once is not enough in float32
            product = product - basis[:taken].mT @ (basis[:taken] @ product)
        length = torch.linalg.vector_norm(product)
        if taken == _STEPS or bool(length <= 1e-6 * tridiagonal[0, 0]):  # the space is closed: a matrix of low rank
            break
        tridiagonal[j, j + 1] = tridiagonal[j + 1, j] = length
        vector = product / length
    top = torch.linalg.eigh(tridiagonal[:taken, :taken]).eigenvectors[:, -1]
    return F.normalize(basis[:taken].mT @ top, dim=0)


__all__ = ["attention_entropy_lower_bound", "power_iteration", "top_singular_vectors"]
