"""Data modules."""

from zoo.data.digits import Digits
from zoo.data.image_folder import ImageFolder, ReportSkipped

__all__ = ["Digits", "ImageFolder", "ReportSkipped"]
