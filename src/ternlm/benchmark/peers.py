"""Other people's ternary training layers in our networks: the same model, only the linear layers are theirs.

Each matrix becomes a layer of its own, as in the models that those packages are made for; latent weights stay float32,
and products are bfloat16 or int8 as the package does them.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.models import LanguageModel


class Peer(NamedTuple):
    """A package whose layer is compared.

    Attributes:
        title: What tables call it.
        package: Name on the package index; empty if nothing needs to be installed.
        convert: Makes its layer from a float32 weight.
        needs_cuda: Whether it runs on NVIDIA GPUs only.
    """

    title: str
    package: str
    convert: "Callable[[Tensor], PeerLayer]"
    needs_cuda: bool = False


class PeerLayer(nn.Module, ABC):
    """One matrix as somebody else's layer, (..., in) -> (..., out) in the type of the input."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


@final
class PublishedLayer(PeerLayer):
    """The layer as papers print it: both operands are rounded and dequantized in each pass, and multiplied in bfloat16.

    Source:
        Wang et al. 2024, The Era of 1-bit LLMs: Training Tips, Code and FAQ, figure 3.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        scale = 1.0 / w.abs().mean().clamp_min(1e-5)
        rounded = w + ((w * scale).round().clamp(-1, 1) / scale - w).detach()
        x_scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
        x = x + ((x * x_scale).round().clamp(-128, 127) / x_scale - x).detach()
        return F.linear(x, rounded.to(x.dtype))


@final
class TransformersLayer(PeerLayer):
    """`AutoBitLinear` of Hugging Face transformers in its online mode, under autocast as its users train it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from transformers.integrations.bitnet import AutoBitLinear

        rows, columns = weight.shape
        self.inner = AutoBitLinear(columns, rows, bias=False, online_quant=True, device="meta")
        self.inner.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            y: Tensor = self.inner(x)
        return y


@final
class TorchaoLayer(PeerLayer):
    """`bitnet_training` of torchao: an int8 product forward, float products backward.

    Its weight is cast to the type of the input on the way in, as its own examples do by keeping it in bfloat16; the
    parameter that learns stays float32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from torchao.prototype.quantized_training import bitnet_training
        from torchao.quantization import quantize_

        rows, columns = weight.shape
        inner = nn.Linear(columns, rows, bias=False, device="meta")
        inner.weight = nn.Parameter(weight)
        quantize_(inner, bitnet_training())
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight.to(x.dtype), None)  # its backward pass counts on three arguments


@final
class OnebitllmsLayer(PeerLayer):
    """`BitNetLinear` of onebitllms: Triton kernels round both operands, and the product is bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from onebitllms import BitNetLinear

        rows, columns = weight.shape
        with torch.device("meta"):
            self.inner = BitNetLinear(columns, rows)
        self.inner.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            y: Tensor = self.inner(x)
        return y


PEERS = {
    "published": Peer("as papers print it", "", PublishedLayer),
    "transformers": Peer("transformers AutoBitLinear", "transformers", TransformersLayer),
    "torchao": Peer("torchao bitnet_training", "torchao", TorchaoLayer),
    "onebitllms": Peer("onebitllms BitNetLinear", "onebitllms", OnebitllmsLayer, needs_cuda=True),
}


def require_peer(name: str, device: torch.device) -> Peer:
    """A peer that runs here.

    Raises:
        SettingsError: There is no such peer.
        EnvironmentFault: It is not installed, or needs another device.
    """
    if name not in PEERS:
        raise SettingsError(f"peer '{name}' is unknown. Use {', '.join(PEERS)}, all or none.")
    peer = PEERS[name]
    if peer.package and version_of(peer) is None:
        raise EnvironmentFault(f"{peer.title} is not compared: it is not installed. Run: pip install {peer.package}")
    if peer.needs_cuda and device.type != "cuda":
        raise EnvironmentFault(f"{peer.title} is not compared: its kernels need an NVIDIA GPU, and this is '{device}'.")
    return peer


def version_of(peer: Peer) -> str | None:
    """The installed version; None if it is not there."""
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def replace_layers(model: LanguageModel, convert: Callable[[Tensor], PeerLayer]) -> None:
    """Put a peer's layers in place of ours, on the same latent weights; before the model has run.

    Raises:
        SettingsError: The model rounds its inputs elsewhere, which a layer with its own rounding cannot take part in.
    """
    layers = model.bit_linears()
    if any(not layer.rounds_input for layer in layers.values()):
        raise SettingsError(
            f"family '{model.settings.family}' rounds activations outside of its linear layers, so a peer's layer does "
            "not fit into it. Compare peers in a model of family bitnet, hgrn or hnet."
        )
    for name, layer in layers.items():
        parts = (part.detach().clone() for part in layer.weight.split(layer.sizes))
        model.set_submodule(name, _Merged(map(convert, parts)))


@final
class _Merged(nn.Module):
    """Layers that read the same input, called as one `BitLinear` is."""

    def __init__(self, layers: Iterable[PeerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, grid: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def count_matrices(model: LanguageModel) -> int:
    """Parameters in layers of a peer."""
    return sum(p.numel() for module in model.modules() if isinstance(module, PeerLayer) for p in module.parameters())
