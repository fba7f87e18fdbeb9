"""Where a training runs, and what is refused. GPUs are made believe: the tests' machines have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from kellm_features.errors import ConfigError
from kellm_features.settings import TrainSettings
from kellm_features.training.device import named_device, require_gpus, take_gpu, training_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """`gpus(2)` makes two believe; the list holds the number of the current one."""

    def build(count: int) -> list[int]:
        current = [0]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: current.__setitem__(0, number))
        return current

    return build


Gpus = Callable[[int], list[int]]


@pytest.mark.parametrize(
    ("name", "ranks", "launcher", "words"),
    [
        ("gpu", 1, "torchrun", r"train.device = 'gpu' is no device \(.*'cpu', 'cuda' and 'cuda:N' are accepted"),
        ("meta", 1, "torchrun", "train.device = 'meta' cannot be trained on: 'cpu', 'cuda' and"),
        (
            "cuda:0",
            2,
            "torchrun",
            "'cuda:0' with train.ranks = 2 by torchrun: each rank is given a GPU of its own; say",
        ),
        ("cuda:1", 1, "spark", "'cuda:1' with train.ranks = 1 by spark: each rank is given a GPU of its own"),
        ("cuda", 1, "torchrun", r"train.device = 'cuda', and PyTorch \S+ finds 0 GPUs here"),
        ("cuda:1", 1, "torchrun", r"train.device = 'cuda:1', and PyTorch \S+ finds 0 GPUs here"),
    ],
)
def test_a_device_that_cannot_be_had_is_named(
    gpus: Gpus, name: str, ranks: int, launcher: Literal["torchrun", "spark"], words: str
) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=words) as caught:
        training_device(TrainSettings(device=name, ranks=ranks, launcher=launcher))
    assert "\n" not in str(caught.value)


def test_the_gpu_that_is_meant(gpus: Gpus) -> None:
    current = gpus(3)
    current[0] = 2
    wanted = {None: ("cuda", 2), "cuda": ("cuda", 2), "cuda:1": ("cuda", 1), "cpu": ("cpu", None)}
    for name, device in wanted.items():
        found = training_device(TrainSettings(device=name))
        assert (found.type, found.index) == device
    with pytest.raises(ConfigError, match=r"'cuda:3', and PyTorch .* finds 3 GPUs"):
        training_device(TrainSettings(device="cuda:3"))
    gpus(0)
    assert training_device(TrainSettings()) == torch.device("cpu")
    assert named_device(TrainSettings(device="cuda", ranks=2)) == torch.device("cuda")  # it may be elsewhere


@pytest.mark.parametrize("name", [None, "cuda"])
def test_ranks_take_a_gpu_each(gpus: Gpus, name: str | None) -> None:
    current = gpus(2)
    settings = TrainSettings(device=name, ranks=2)
    require_gpus(settings)
    for number in (1, 0):
        assert take_gpu(settings, number) == torch.device("cuda", number)
        assert current == [number]
    with pytest.raises(ConfigError, match="rank 2 of a machine with 2 GPUs"):
        take_gpu(settings, 2)
    with pytest.raises(ConfigError, match=r"train.ranks = 3 on 2 GPUs"):
        require_gpus(TrainSettings(device=name, ranks=3))


def test_ranks_on_the_cpu_leave_gpus_alone(gpus: Gpus) -> None:
    current = gpus(1)
    current[0] = 5
    settings = TrainSettings(device="cpu", ranks=3)
    require_gpus(settings)
    assert take_gpu(settings, 2) == torch.device("cpu")
    assert current == [5]
