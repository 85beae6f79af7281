"""What train.py trains on: uint8 images, the same for everyone who draws image i in epoch e, in whichever process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Data(NamedTuple):
    train: Samples
    val: Samples
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels / 255
    std: tuple[float, ...]


class Samples(Dataset):
    """Images [C,H,W], uint8, with their labels; with `patches`, a random order of that many patches for a label.

    Random numbers depend on (seed, epoch, index) alone: neither the number of processes or workers nor an interruption
    changes an image. Set `epoch` before workers start.
    """

    def __init__(self, images: Any, transform: Callable[[Any], torch.Tensor], seed: int):
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0
        self.patches: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        image, label = self.images[index]
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)) % 2**63)  # of ints: never salted
            image = self.transform(image)
            return image, label if self.patches is None else torch.randperm(self.patches)


def batches(
    samples: Samples, batch: int, *, epoch: int, rank: int, world: int, train: bool, **options: Any
) -> DataLoader:
    """One epoch of this process, `batch` images at a time; in training shuffled, and whole batches only.

    Batch b of all processes together has the same images however many there are. In evaluation every process has as
    many, so the first images may come once more at the end, as padding.
    """
    samples.epoch = epoch if train else 0
    sampler = DistributedSampler(samples, world, rank, shuffle=train, seed=samples.seed, drop_last=train)
    sampler.set_epoch(epoch)
    generator = torch.Generator()  # the workers' seeds are drawn from it, not from the model's random numbers
    return DataLoader(samples, batch, sampler=sampler, drop_last=train, generator=generator, **options)


def load(where: str, size: int, seed: int) -> Data:
    """`where`: "digits", or a folder of train/<class>/* and val/<class>/*; images come as size x size pixels."""
    return digits(size, seed) if where == "digits" else folder(Path(where), size, seed)


def digits(size: int, seed: int) -> Data:
    """scikit-learn's 1797 digits of 8 x 8 pixels, every fifth of each class held out; nothing is downloaded."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    pixels = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]  # [1797, 1, 8, 8]
    split = train_test_split(range(len(pixels)), test_size=0.2, stratify=found.target, random_state=0)
    train, val = ([(pixels[i], int(found.target[i])) for i in part] for part in split)
    resize = [] if size == 8 else [v2.Resize(size)]
    moved = v2.Compose([v2.RandomCrop(8, padding=1), *resize])  # no flips: a mirrored digit is none
    return Data(
        Samples(train, moved, seed), Samples(val, v2.Compose([v2.Identity(), *resize]), seed), 10, (0.305,), (0.376,)
    )


def folder(path: Path, size: int, seed: int) -> Data:
    """ImageFolder's layout; the crops, flips and sizes of DeiT (https://arxiv.org/abs/2012.12877)."""
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"--data {path}: there is no folder {path / part} of one folder a class")
    train, val = ImageFolder(path / "train"), ImageFolder(path / "val")  # PIL images: uint8
    if train.classes != val.classes:
        differ = sorted({*train.classes} ^ {*val.classes})
        raise ValueError(f"--data {path}: {len(differ)} classes are not in both train and val: {', '.join(differ[:5])}")
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.Compose([v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    middle = v2.Compose([v2.Resize(size * 256 // 224, bicubic), v2.CenterCrop(size), v2.PILToTensor()])
    return Data(
        Samples(train, crop, seed), Samples(val, middle, seed), len(train.classes),
        IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD,
    )  # fmt: skip
