"""On the head: asks the cluster for two GPUs on two hosts, as a training run does; its last line are the hosts' addresses."""

from __future__ import annotations

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_gpus=1, num_cpus=0)
def where() -> str:
    return str(ray.util.get_node_ip_address())


def main() -> None:
    ray.init("127.0.0.1:6379", log_to_driver=False, logging_level="ERROR")
    group = placement_group([{"GPU": 1}] * 2, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=300)
    spots = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in range(2)]
    print(*ray.get([where.options(scheduling_strategy=spot).remote() for spot in spots], timeout=60))
    remove_placement_group(group)


if __name__ == "__main__":
    main()
