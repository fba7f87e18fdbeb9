"""Where a training runs."""

from __future__ import annotations

import torch

from kellm_features.errors import ConfigError, first_line
from kellm_features.settings import TrainSettings


def named_device(settings: TrainSettings) -> torch.device | None:
    """The device that `train.device` names, whether or not this machine has it; None where it names none.

    Raises:
        ConfigError: it is no device, neither CPU nor CUDA, or one GPU for ranks that are given theirs.
    """
    name = settings.device
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"train.device = {name!r} is no device ({first_line(error)}): 'cpu', 'cuda' and 'cuda:N' are accepted"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device = {name!r} cannot be trained on: 'cpu', 'cuda' and 'cuda:N' are accepted")
    if device.index is not None and device.type == "cuda" and (settings.ranks > 1 or settings.launcher == "spark"):
        raise ConfigError(
            f"train.device = {name!r} with train.ranks = {settings.ranks} by {settings.launcher}: each rank is given a "
            "GPU of its own; say 'cuda'"
        )
    return device


def training_device(settings: TrainSettings) -> torch.device:
    """Where this process trains: on the device named, else on the GPU that is current, else on the CPU.

    Raises:
        ConfigError: see `named_device`; or this machine has no such GPU.
    """
    device = named_device(settings)
    if device is None:
        return _current() if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count()
    if (device.index or 0) >= there:
        raise ConfigError(
            f"train.device = {settings.device!r}, and PyTorch {torch.__version__} finds {there} GPUs here: name one of "
            "these, say 'cpu', or install a PyTorch for the GPU that is there"
        )
    return device if device.index is not None else _current()


def require_gpus(settings: TrainSettings) -> None:
    """Check that ranks which train on GPUs would have one each on this machine.

    Raises:
        ConfigError: they are more than its GPUs; see `training_device`.
    """
    there = torch.cuda.device_count()
    if training_device(settings).type == "cuda" and settings.ranks > there:
        raise ConfigError(
            f"train.ranks = {settings.ranks} on {there} GPUs: each rank needs one of its own; lower train.ranks, set "
            "train.device = 'cpu', or start them on a cluster with train.launcher = 'spark'"
        )


def take_gpu(settings: TrainSettings, number: int) -> torch.device:
    """Where one rank of several trains; a GPU becomes the current one of its process.

    Args:
        settings: device and ranks.
        number: of the rank on this machine.

    Raises:
        ConfigError: the machine has fewer GPUs; see `training_device`.
    """
    device = training_device(settings)
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"rank {number} of a machine with {there} GPUs has none of its own: start as many ranks there, or set "
            "train.device = 'cpu'"
        )
    torch.cuda.set_device(number)
    return _current()


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
