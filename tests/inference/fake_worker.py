"""A worker whose network is a threshold and needs no torch; run as a program by the tests."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# The fake predictor stands in a test module, which needs pytest; nothing else of it does.
sys.path.insert(0, str(Path(__file__).parent))


def misbehave(orders: dict[str, str], mark: float) -> None:
    """Do to a case, known by its first voxel, what the test ordered."""
    order = orders.get(str(int(mark)), "")
    if order.startswith("once "):
        spent = Path(orders["spent"])
        if spent.exists():
            return
        spent.touch()
        order = order.removeprefix("once ")
    if order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == "hang":
        time.sleep(3600)
    elif order == "exit":
        os._exit(3)
    elif order == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif order == "memory":
        raise MemoryError
    elif order.startswith("slow"):
        time.sleep(float(order.split()[1]))


def make(setup: Any) -> Any:
    """Build the fake predictor."""
    from fakes import ThresholdPredictor

    orders = dict(setup.options)
    if orders.get("load") == "die":
        os._exit(9)
    if orders.get("load") == "hang":
        time.sleep(3600)
    if orders.get("load") == "broken":
        from medmamba.errors import BundleError

        raise BundleError("model m: weights are missing.")
    if orders.get("load") == "bug":
        raise ValueError("a bug")

    def on_infer(mark: float, on_tiles: Any) -> None:
        on_tiles(1, 1000)
        misbehave(orders, mark)
        on_tiles(1000, 1000)

    drifts = orders.get("load") == "drift" and Path(orders["spent"]).exists()
    level = 70.0 if drifts else 50.0
    return ThresholdPredictor(level=level, on_infer=on_infer), {"settings": "as a fake"}


if __name__ == "__main__":
    from medmamba.inference.worker import serve
    from medmamba.inference.worker_process import Supervisor

    supervisor = Supervisor()
    os.write(1, b"what is printed must not disturb\n")
    serve(make, supervisor)
