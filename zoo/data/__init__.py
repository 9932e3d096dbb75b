"""Data modules."""

from zoo.data.digits import Digits
from zoo.data.image_folder import ImageFolder, ReportSkipped
from zoo.data.latents import CachedLatents, TeacherLatents
from zoo.data.train_loader import TrainLoader

__all__ = ["CachedLatents", "Digits", "ImageFolder", "ReportSkipped", "TeacherLatents", "TrainLoader"]
