"""Starts a Ray cluster of two one-core machines, prints its address and runs until stdin closes.

A line on stdin takes one machine away.
"""

import os
import sys

# Loopback: Ray would otherwise use an address that a sandbox cannot reach itself by.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def main() -> None:
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **store},
    )
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for _ in sys.stdin:  # a line takes a machine away, as a cut cable does
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    cluster.shutdown()


if __name__ == "__main__":
    main()
