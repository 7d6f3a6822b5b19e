r"""Correction regularised ReLU (Sun et al., *A Method on Searching Better Activation Functions*, arXiv 2405.12954).

.. math:: f(x) = \max(0, x) + \varepsilon x e^{-x^2/2}

with one learnable :math:`\varepsilon` for each place where the activation stands. Ours: one for each channel or one for
the whole model, and the calibrated form :math:`\varepsilon (x - \mu) e^{-(x-\mu)^2 / (2\sigma^2)}`, since the
pre-activations of real networks have a spread far from 1.
"""

# No `from __future__ import annotations`: scripting reads the annotations of the class's attributes as they are.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.crrelu import crrelu
from lightning_entropy.functional.crrelu_formula import along_channels, crrelu_formula

SCOPES = ("site", "channel", "global")


class CRReLU(nn.Module):
    r"""ReLU with a learnable bump around zero, :math:`\max(0, x) + \varepsilon (x-\mu) e^{-(x-\mu)^2/(2\sigma^2)}`.

    ``eps`` is not clamped and may turn negative. It stays in float32 when the module is cast to half or bfloat16 (its
    spacing near 0.01 would be 6e-5 there, and small steps would vanish), and in float64 after ``.double()``. It should
    have no weight decay, which would pull the activation towards ReLU. Checkpoints without it (of a model with ReLU or
    GELU) load strictly and leave it as it is; a scalar called ``lr``, as public code has it, is taken for it.

    Args:
        eps: initial height of the bump. 0 is ReLU, to the bit.
        scope: ``"site"``: one eps for each module; ``"channel"``: one for each channel; ``"global"``: one for all
            modules that are given the same ``holder``.
        mu: centre of the bump. Other than 0 (or once calibrated) it is a buffer.
        sigma: width of the bump, > 0, likewise; see :func:`calibrate`.
        channels: number of channels, for ``scope="channel"``; None takes it from the first input (run the model once
            before its optimizer is made).
        channel_dim: dimension of the channels: -1 after linear layers, 1 after convolutions.
        holder: for ``scope="global"``, the CRReLU whose eps is shared; None makes this one a holder.
        inplace: taken and ignored, since models pass it to the activations they build.
        device: where eps is made.

    Raises:
        ValueError: if an argument is out of range or does not go with the scope.

    Shape:
        Any; the output has the shape and dtype of the input.

    Reference:
        Sun et al. (2024), arXiv 2405.12954.

    Example:
        >>> CRReLU()(torch.tensor([-1.0, 0.0, 1.0])).tolist()  # doctest: +ELLIPSIS
        [-0.0060..., 0.0, 1.0060...]
    """

    eps: Tensor
    mu: Tensor | None
    sigma: Tensor | None

    def __init__(
        self,
        eps: float = 0.01,
        *,
        scope: str = "site",
        mu: float = 0.0,
        sigma: float = 1.0,
        channels: int | None = None,
        channel_dim: int = -1,
        holder: "CRReLU | None" = None,
        inplace: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_types(CRReLU, locals())
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        if not abs(eps) <= torch.finfo(torch.float32).max:
            raise ValueError(f"eps must be finite, got {eps}; it is held in float32")
        if channels is not None and (scope != "channel" or channels < 1):
            raise ValueError(f'channels must be >= 1 and goes with scope="channel", got {channels} with {scope!r}')
        if holder is not None and scope != "global":
            raise ValueError(f'holder goes with scope="global", got scope={scope!r}')
        self.scope = scope
        self.channel_dim = channel_dim
        self.initial_eps = float(eps)
        if holder is not None:
            self.eps = holder.eps
        elif scope == "channel" and channels is None:
            self.eps = UninitializedParameter(device=device, dtype=torch.float32)  # type: ignore[call-arg]
        else:
            self.eps = nn.Parameter(torch.full((channels or 1,), self.initial_eps, dtype=torch.float32, device=device))
        self.register_buffer("mu", None)
        self.register_buffer("sigma", None)
        if mu != 0 or sigma != 1:
            self.set_bump(mu, sigma)

    def set_bump(self, mu: Tensor | float, sigma: Tensor | float) -> None:
        """Set centre and width of the bump.

        Args:
            mu: centre; a number, or one for each channel with ``scope="channel"``.
            sigma: width, > 0, likewise.

        Raises:
            ValueError: if a value is not finite, ``sigma`` is not positive, or the sizes do not fit.
        """
        dtype = torch.promote_types(self.eps.dtype, torch.float32)
        new = [
            torch.as_tensor(v, dtype=dtype, device=self.eps.device).detach().reshape(-1).clone() for v in (mu, sigma)
        ]
        lazy = isinstance(self.eps, UninitializedParameter)
        for name, value in zip(("mu", "sigma"), new, strict=True):
            if not lazy and value.numel() not in (1, self.eps.numel()):
                raise ValueError(f"{name} must have 1 or {self.eps.numel()} values, got {value.numel()}")
            if not bool(value.isfinite().all()) or (name == "sigma" and not bool((value > 0).all())):
                raise ValueError(f"{name} must be finite{' and > 0' * (name == 'sigma')}, got {value.tolist()}")
        self.mu, self.sigma = new

    def forward(self, x: Tensor) -> Tensor:
        """CRReLU of ``x``."""
        if torch.jit.is_scripting():
            mu, sigma = self.mu, self.sigma
            dims, at = x.dim(), self.channel_dim
            return crrelu_formula(
                x,
                along_channels(self.eps, dims, at),
                None if mu is None else along_channels(mu, dims, at),
                None if sigma is None else along_channels(sigma, dims, at),
            )
        else:
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        if isinstance(self.eps, UninitializedParameter):
            self._make_eps(x.shape[self.channel_dim])
        at = self.channel_dim if self.scope == "channel" else None
        if self.mu is None or self.sigma is None:
            return crrelu(x, self.eps, channel_dim=at)
        return crrelu(x, self.eps, mu=self.mu, sigma=self.sigma, channel_dim=at)

    def _make_eps(self, channels: int) -> None:
        with torch.no_grad():
            self.eps.materialize((channels,))  # type: ignore[attr-defined]
            self.eps.fill_(self.initial_eps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CRReLU":
        def wide(t: Tensor) -> Tensor:
            if isinstance(t, UninitializedParameter):  # which few conversions take: a stand-in shows what this one does
                new = fn(torch.empty(0, dtype=t.dtype, device=t.device))
                return t.to(new.device, torch.promote_types(new.dtype, torch.float32))
            new = fn(t)
            if not new.is_floating_point() or new.dtype.itemsize >= 4:
                return new
            return t.to(new.device, torch.float32)  # from what it was, not from what it was rounded to

        super()._apply(wide, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if isinstance(self.eps, UninitializedParameter):  # cannot be detached; loads into another that has no size yet
            destination[f"{prefix}eps"] = self.eps
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {name: f"{prefix}{name}" for name in ("eps", "mu", "sigma")}
        if names["eps"] not in state_dict and f"{prefix}lr" in state_dict:
            state_dict[names["eps"]] = state_dict.pop(f"{prefix}lr")
        if isinstance(state_dict.get(names["eps"]), UninitializedParameter):
            del state_dict[names["eps"]]
        absent = names["eps"] not in state_dict
        if absent:
            # A checkpoint of the activation that this one replaced: all stays as it is.
            held = {key: getattr(self, name) for name, key in names.items()}
            state_dict |= {
                k: v.detach() for k, v in held.items() if v is not None and k not in state_dict and _sized(v)
            }
        else:
            self._fit(state_dict, names)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if absent and names["eps"] in missing_keys:
            missing_keys.remove(names["eps"])

    def _fit(self, state_dict: dict[str, Any], names: dict[str, str]) -> None:
        """Bring what a checkpoint holds into the shapes that are held here, and make room for what is not yet here."""
        for name, key in names.items():
            value = state_dict.get(key)
            if value is None:
                continue
            value = value.to(torch.promote_types(value.dtype, torch.float32)).reshape(-1)
            if name == "eps":
                if isinstance(self.eps, UninitializedParameter):
                    self._make_eps(value.numel())
                if value.numel() == 1:
                    value = value.expand(self.eps.numel())
            elif (held := getattr(self, name)) is None or held.shape != value.shape:
                setattr(self, name, torch.empty_like(value, device=self.eps.device))
            state_dict[key] = value

    def extra_repr(self) -> str:
        """Scope, number of channels and, where they are not the paper's, centre and width of the bump."""
        parts = [f"scope={self.scope}"]
        if self.scope == "channel":
            size = "from the first input" if isinstance(self.eps, UninitializedParameter) else self.eps.numel()
            parts += [f"channels={size}", f"channel_dim={self.channel_dim}"]
        if self.mu is not None:
            parts.append("calibrated")
        return ", ".join(parts)


def _sized(parameter: Tensor) -> bool:
    return not isinstance(parameter, UninitializedParameter)
