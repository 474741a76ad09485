"""The parts SimpleNet is made of, one file each."""

from .adapter import Adapter
from .anomaly_generator import AnomalyGenerator
from .anomaly_map import AnomalyMapGenerator
from .discriminator import Discriminator
from .feature_extractor import FeatureExtractor, PretrainedWeightsError
from .patch_aggregation import PatchAggregation

__all__ = [
    "Adapter",
    "AnomalyGenerator",
    "AnomalyMapGenerator",
    "Discriminator",
    "FeatureExtractor",
    "PatchAggregation",
    "PretrainedWeightsError",
]
