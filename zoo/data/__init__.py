"""Data modules."""

from zoo.data.cifar import CIFAR10, CIFAR100
from zoo.data.decode import read_image
from zoo.data.digits import Digits
from zoo.data.hugging_face import HuggingFace
from zoo.data.image_folder import ImageFolder, PlainFolder
from zoo.data.latents import CachedLatents, TeacherLatents
from zoo.data.loading import ImageData, ReportSkipped
from zoo.data.train_loader import TrainLoader
from zoo.data.web_dataset import WebDataset

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CachedLatents",
    "Digits",
    "HuggingFace",
    "ImageData",
    "ImageFolder",
    "PlainFolder",
    "ReportSkipped",
    "TeacherLatents",
    "TrainLoader",
    "WebDataset",
    "read_image",
]
