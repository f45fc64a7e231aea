"""Planning: what a run will take, before anything is loaded, and what makes it fit."""

from .prediction import Prediction, predict, predict_model
from .sharding import Sharding

__all__ = ["Prediction", "Sharding", "predict", "predict_model"]
