"""Arguments of ``from_pretrained`` as transformers has them: taken, without effect, or refused.

A program written for transformers passes what it likes; nothing of it may be silently dropped
that would have changed the result there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["drop_arguments", "parse_device_map", "require_device"]

# They choose among ways to the same result.
_NO_EFFECT = (
    "_fast_init",
    "attn_implementation",
    "low_cpu_mem_usage",
    "mirror",
    "offload_state_dict",
    "resume_download",
    "trust_remote_code",
)
_ONE_DEVICE = "the model is placed on one device, whole"
# What each would ask for is not here; false and None ask for nothing.
_REFUSED = {
    "adapter_kwargs": "adapters are loaded by peft: PeftModel.from_pretrained(model, name)",
    "device_mesh": _ONE_DEVICE,
    "disable_mmap": "weights are always mapped into memory",
    "distributed_config": _ONE_DEVICE,
    "from_flax": "Flax checkpoints are not read",
    "from_tf": "TensorFlow checkpoints are not read",
    "fusion_config": "the kernels are fused already",
    "gguf_file": "GGUF files are not read",
    "key_mapping": "rename the entries of a state_dict and pass that",
    "load_in_4bit": "there are 8-bit weights only: model.optimize_for_inference('int8')",
    "load_in_8bit": "call model.optimize_for_inference('int8') on what is loaded",
    "max_memory": _ONE_DEVICE,
    "offload_buffers": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "proxies": "set the environment variables HTTPS_PROXY and NO_PROXY",
    "quantization_config": "other quantized weights than those of save_frozen are not read",
    "return_unused_kwargs": "a keyword that is no argument is a setting of the configuration",
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "use_auth_token": "its name is token",
    "use_kernels": "the kernels are this package's",
}
_ANY_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")


def drop_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of keyword arguments without those that ask for nothing here.

    Raises:
        ValueError: an argument asks for something that is not done; the message says what to do.
    """
    left = {name: value for name, value in arguments.items() if name not in _NO_EFFECT}
    if not left.pop("weights_only", True):
        raise ValueError("weights_only must be true: a pickle that runs code is never loaded")
    for name, reason in _REFUSED.items():
        value = left.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported: {reason}")
    return left


def parse_device_map(device_map: object) -> torch.device:
    """The one device that ``device_map`` names: a device, or ``{"": device}``.

    None and the ways to spread a model ("auto", "balanced", ...) are the CPU, which the kernels
    are for.

    Raises:
        ValueError: it names several devices, or none that torch knows.
    """
    # Imported late: the tokenizer's arguments are read without it.
    import torch

    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(
                f"device_map must be a device or {{'': device}}, got parts "
                f"{[str(part) for part in device_map][:4]}: {_ONE_DEVICE}"
            )
        device_map = device_map[""]
    if device_map is None or (isinstance(device_map, str) and device_map in _ANY_DEVICE):
        return torch.device("cpu")
    if isinstance(device_map, bool) or not isinstance(device_map, (str, int, torch.device)):
        raise ValueError(f"device_map must be a device, got {device_map!r}")
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device_map must be a device, got {device_map!r}: {reason}") from None
    if device.type == "meta":
        raise ValueError("device_map must be a device that holds data, got 'meta'")
    return device


def require_device(name: str, device: torch.device) -> None:
    """ValueError where torch does not have this device; ``name`` is the argument that asks for it.

    Whether memory can be had there is for torch to say.
    """
    import torch

    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        which = f"{name} is {device}: torch {torch.__version__}"
        if torch.version.cuda is None and torch.version.hip is None:
            raise ValueError(f"{which} is built for the CPU alone")
        raise ValueError(f"{which} finds no GPU, or no driver for it")
    if device.index is not None and device.index >= count:
        raise ValueError(f"{name} is {device}: torch finds {count} GPUs, counted from 0")
