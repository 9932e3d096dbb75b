"""Data modules."""

from zoo.data.decode import read_image
from zoo.data.digits import Digits
from zoo.data.image_folder import ImageFolder, PlainFolder
from zoo.data.latents import CachedLatents, TeacherLatents
from zoo.data.loading import ImageData, ReportSkipped

__all__ = [
    "CachedLatents",
    "Digits",
    "ImageData",
    "ImageFolder",
    "PlainFolder",
    "ReportSkipped",
    "TeacherLatents",
    "read_image",
]
