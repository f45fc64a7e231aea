"""Planning: what a run will take, before anything is loaded, and what makes it fit."""

from .advice import Advice, Change, advise
from .prediction import Prediction, plan, predict, predict_model
from .sharding import Sharding

__all__ = ["Advice", "Change", "Prediction", "Sharding", "advise", "plan", "predict", "predict_model"]
