"""Runs a program on a Ray cluster of nodes that are processes of this machine.

    python ray_cluster.py NODES PROGRAM.py [ARGUMENT ...]

Ends with the exit status of the program, which finds the cluster by RAY_ADDRESS.
"""

import os
import subprocess
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Starts the cluster and the program."""
    nodes, *command = sys.argv[1:]
    cluster = Cluster()
    try:
        # On a node of its own, what starts the run outlives the others.
        cluster.add_node(num_cpus=0)
        for _ in range(int(nodes)):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        variables = os.environ | {"RAY_ADDRESS": cluster.address}
        status = subprocess.run([sys.executable, *command], env=variables).returncode
    finally:
        cluster.shutdown()
    sys.exit(status)


if __name__ == "__main__":
    main()
