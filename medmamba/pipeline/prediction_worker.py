"""The worker process of ``predict``: ``python -m medmamba.pipeline.prediction_worker``.

Not for people: it speaks with its supervisor over its standard streams and ends with it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmamba.inference.ensemble import EnsemblePredictor
    from medmamba.inference.worker import WorkerSetup

MODULE = "medmamba.pipeline.prediction_worker"

KEPT_BLOCK_BYTES = 2**26
KEPT_BYTES = 2**28
"""Freed memory that is not given back; hippocampus cases in fp32 take 6 % less processor time."""


def main() -> None:
    """Load what a model needs while the supervisor still looks at the inputs, then serve."""
    from medmamba.inference.worker_process import Supervisor

    supervisor = Supervisor()
    from medmamba.inference.worker import serve

    serve(make_predictor_of, supervisor)


def make_predictor_of(setup: "WorkerSetup") -> tuple["EnsemblePredictor", dict[str, Any]]:
    """Load the model that a setup names; the second value is what people are told of it.

    Raises:
        BundleError, SecurityError: the model cannot be used, or is another than before.
    """
    from medmamba.bundle import load_bundle
    from medmamba.errors import SecurityError
    from medmamba.pipeline.predictors import describe_settings, make_predictor
    from medmamba.training.precision import keep_freed_memory

    options = dict(setup.options)
    bundle = load_bundle(Path(options.pop("bundle")))
    if bundle.sha256 != setup.model.sha256:
        raise SecurityError(
            f"model {setup.model.name}: its files have changed since the run began. Run again.",
            code="E_MODEL_HASH",
        )
    # Activations stay with the process, images do not.
    keep_freed_memory(block_bytes=KEPT_BLOCK_BYTES, total_bytes=KEPT_BYTES)
    predictor = make_predictor(bundle, **options)
    return predictor, {"settings": describe_settings(predictor)}


if __name__ == "__main__":
    main()
