"""What the monitoring files ask Prometheus for: every expression of dashboards, rules and alerts, and the metrics that it names.

A reader of as much PromQL as those files use; whether an expression is right at all is Prometheus' own business (`promtool`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).resolve().parents[1] / "cluster" / "monitoring"
DASHBOARDS = sorted((SHIPPED / "grafana").glob("*.json"))
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool", "inf", "nan"}
NOT_NAMES = (
    r'"(?:[^"\\]|\\.)*"',  # what label matchers compare with, and so before the braces around it
    r"\{[^}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\b\d[\w.]*",
)


def metrics(expression: str) -> set[str]:
    """Names of the metrics in an expression."""
    for pattern in NOT_NAMES:
        expression = re.sub(pattern, " ", expression)
    # A name before a parenthesis is a function's.
    return set(re.findall(r"\b[a-zA-Z_][\w:]*\b(?!\s*\()", expression)) - WORDS


def rules(name: str) -> list[dict[str, Any]]:
    """All rules of a shipped file."""
    return [rule for group in yaml.safe_load((SHIPPED / name).read_text())["groups"] for rule in group["rules"]]


def panels(file: Path) -> list[tuple[str, str]]:
    """Title and expression of every query of a dashboard; its variables stand for everything."""
    found = json.loads(file.read_text())["panels"]
    queries = [(f"{file.stem}: {panel['title']}", target["expr"]) for panel in found for target in panel["targets"]]
    return [(title, re.sub(r"\$(?:model|run)\b", ".*", expression)) for title, expression in queries]


def expressions() -> list[tuple[str, str]]:
    """Where and what, for everything that is asked."""
    asked = [(rule.get("record") or rule["alert"], rule["expr"]) for name in ("rules.yml", "alerts.yml") for rule in rules(name)]
    return asked + [panel for file in DASHBOARDS for panel in panels(file)]


def named() -> set[str]:
    """Every metric that something asks for."""
    return set().union(*(metrics(expression) for _, expression in expressions()))
