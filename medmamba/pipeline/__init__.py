"""The four verbs: plan, train, predict, evaluate; each composes the layers below, none prints."""

from medmamba.pipeline.evaluating import evaluate
from medmamba.pipeline.planning import PlanOutcome, plan
from medmamba.pipeline.predicting import PredictOutcome, predict
from medmamba.pipeline.training import TrainOutcome, train
from medmamba.pipeline.work import Work, open_work

__all__ = [
    "PlanOutcome",
    "PredictOutcome",
    "TrainOutcome",
    "Work",
    "evaluate",
    "open_work",
    "plan",
    "predict",
    "train",
]
