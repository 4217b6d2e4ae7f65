"""The Grafana dashboard beside ``startup_metrics`` shows what is exported, by Grafana's rules."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rayserve_hooks.impls import compile_cache, startup_metrics

FILE = Path(startup_metrics.__file__).with_name("startup_metrics_dashboard.json")
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
LABELS = {
    **{
        name: {"model_id", "deployment", "replica", *labels}
        for name, (_, labels) in startup_metrics.LABELS.items()
    },
    compile_cache.STARTS: {"model_id", "deployment", "replica", "result", "factor"},
}

# Of Grafana's dashboard kind (kinds/dashboard/dashboard_kind.cue, schema version 39): what is used,
# with what it demands and which values it takes. Nothing else may be there.
DATASOURCE = {
    "type": "object",
    "required": ["type", "uid"],
    "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}},
}
TARGET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["refId", "expr", "datasource"],
    "properties": {
        "refId": {"pattern": "^[A-Z]$"},
        "expr": {"type": "string", "minLength": 1},
        "legendFormat": {"type": "string"},
        "instant": {"type": "boolean"},
        "range": {"type": "boolean"},
        "datasource": DATASOURCE,
    },
}
PANEL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id", "type", "title", "gridPos", "targets", "datasource", "fieldConfig"],
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"enum": ["stat", "bargauge", "timeseries", "table"]},
        "title": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "datasource": DATASOURCE,
        "gridPos": {
            "type": "object",
            "additionalProperties": False,
            "required": ["x", "y", "w", "h"],
            "properties": {
                "x": {"type": "integer", "minimum": 0, "maximum": 23},
                "y": {"type": "integer", "minimum": 0},
                "w": {"type": "integer", "minimum": 1, "maximum": 24},
                "h": {"type": "integer", "minimum": 1},
            },
        },
        "targets": {"type": "array", "minItems": 1, "items": TARGET},
        "fieldConfig": {
            "type": "object",
            "additionalProperties": False,
            "required": ["defaults", "overrides"],
            "properties": {
                "defaults": {"properties": {"unit": {"enum": ["s", "none"]}}, "required": ["unit"]},
                "overrides": {"type": "array"},
            },
        },
        "options": {"type": "object"},
    },
}
VARIABLE = {
    "type": "object",
    "required": ["name", "type", "query"],
    "properties": {
        "name": {"pattern": r"^\w+$"},
        "type": {"enum": ["datasource", "query"]},
        "refresh": {"enum": [0, 1, 2]},
        "includeAll": {"type": "boolean"},
        "multi": {"type": "boolean"},
        "datasource": DATASOURCE,
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        "uid": {"type": "string", "pattern": r"^[\w-]{1,40}$"},
        "title": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "version": {"type": "integer"},
        "editable": {"type": "boolean"},
        "graphTooltip": {"enum": [0, 1, 2]},
        "timezone": {"enum": ["browser", "utc", ""]},
        "refresh": {"type": "string", "pattern": r"^\d+[smh]$"},
        "time": {
            "required": ["from", "to"],
            "properties": {"from": {"type": "string"}, "to": {"type": "string"}},
        },
        "templating": {
            "additionalProperties": False,
            "properties": {"list": {"type": "array", "items": VARIABLE}},
        },
        "annotations": {"properties": {"list": {"type": "array"}}},
        "links": {"type": "array"},
        "panels": {"type": "array", "minItems": 1, "items": PANEL},
    },
}


def test_the_dashboard_is_one_by_the_rules_of_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(DASHBOARD, SCHEMA)


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_asks_for_metrics_and_labels_that_are_exported(panel: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    (target,) = panel["targets"]
    expr = target["expr"]
    assert expr.count("(") == expr.count(")")
    asked = re.findall(r"ray_(rayserve_hooks_\w+)\{([^}]*)\}", expr)
    assert asked
    assert len(asked) == expr.count("rayserve_hooks_")
    known = set.intersection(*(LABELS[name] for name, _ in asked))
    for _, matchers in asked:
        parts = re.findall(r'(\w+)(?:=~|=|!=)"([^"]*)"(?:,|$)', matchers)
        assert ",".join(re.findall(r'\w+(?:=~|=|!=)"[^"]*"', matchers)) == matchers
        assert {label for label, _ in parts} <= known
    for labels in re.findall(r"by \(([^)]*)\)", expr):
        assert set(labels.split(", ")) <= known
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= {
        label for labels in re.findall(r"by \(([^)]*)\)", expr) for label in labels.split(", ")
    }
    assert set(re.findall(r"\$(\w+)", expr)) <= variables | {"__range"}


def test_each_metric_is_shown() -> None:
    shown = set(re.findall(r"ray_(rayserve_hooks_\w+)", FILE.read_text()))
    assert shown == set(LABELS)
