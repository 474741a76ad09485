"""The parts SimpleNet is made of, one file each."""

from .adapter import Adapter as Adapter
from .anomaly_generator import AnomalyGenerator as AnomalyGenerator
from .anomaly_map import AnomalyMapGenerator as AnomalyMapGenerator
from .discriminator import Discriminator as Discriminator
from .feature_extractor import FeatureExtractor as FeatureExtractor
from .feature_extractor import PretrainedWeightsError as PretrainedWeightsError
from .patch_aggregation import PatchAggregation as PatchAggregation
