"""What machines cost per hour: a small table, noted by hand, and which entry of it a node type of a manifest means.

Approximate list prices on demand, Linux, without disks, addresses and traffic, in the regions that the shipped manifests name.
Spot prices move all the time: `SPOT_SHARE` is an estimate and is always called one. A machine that is not in the table has no
price here; nothing is guessed. Callers: `bill` before a cluster starts, `status` while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTED = "2026-11-27"
REGIONS = "AWS us-west-2 and us-east-1, Google Cloud us-central1, Azure West US 3"
SPOT_SHARE = 0.4  # of the price on demand
PER_HOUR = {
    # AWS: no GPU, L4, L40S, 8 A100, 8 H100, 8 H200
    "m7i.large": 0.1008, "m7i.xlarge": 0.2016, "m7i.2xlarge": 0.4032,
    "g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "g6.4xlarge": 1.3232, "g6.12xlarge": 4.6016, "g6.48xlarge": 13.3504,
    "g6e.xlarge": 1.861, "g6e.2xlarge": 2.24208, "g6e.4xlarge": 3.00424, "g6e.12xlarge": 10.49264, "g6e.48xlarge": 30.13118,
    "p4d.24xlarge": 21.957642, "p5.48xlarge": 55.04, "p5en.48xlarge": 63.296,
    # Google Cloud: no GPU, L4, 8 H100, 8 H200
    "e2-standard-4": 0.134, "n2-standard-4": 0.1942, "g2-standard-4": 0.7068, "g2-standard-8": 0.8536,
    "a3-highgpu-8g": 88.49, "a3-ultragpu-8g": 84.8069,
    # Azure: no GPU, A100, H100, 8 H100, 8 H200
    "Standard_D4s_v5": 0.192, "Standard_NC24ads_A100_v4": 3.673, "Standard_NC40ads_H100_v5": 6.98,
    "Standard_ND96isr_H100_v5": 98.32, "Standard_ND96isr_H200_v5": 84.80,
}  # fmt: skip


def machine_of(node_type: Mapping[str, Any]) -> str | None:
    """The cloud's name of the machine behind one entry of `available_node_types`; None for a machine of one's own."""
    config = node_type.get("node_config") or {}
    found = config.get("InstanceType") or config.get("machineType") or config.get("azure_arm_parameters", {}).get("vmSize")
    return str(found) if found else None


def is_spot(node_type: Mapping[str, Any]) -> bool:
    """Whether the cloud may take the machine back."""
    config = node_type.get("node_config") or {}
    return bool(
        config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or config.get("scheduling", {}).get("provisioningModel") == "SPOT"
        or config.get("azure_arm_parameters", {}).get("priority") == "Spot"
    )


def hourly_price(node_type: Mapping[str, Any]) -> float | None:
    """US dollars per hour of one node; None where the table does not know the machine.

    `node_config.price_per_hour` is believed before the table; a machine of one's own without it costs nothing. Spot: an estimate.

    Args:
        node_type: One entry of a manifest's `available_node_types`.
    """
    given = (node_type.get("node_config") or {}).get("price_per_hour")
    if given is not None:
        return float(given)
    machine = machine_of(node_type)
    if machine is None:
        return 0.0
    price = PER_HOUR.get(machine)
    return price * SPOT_SHARE if price is not None and is_spot(node_type) else price
