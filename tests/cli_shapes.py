"""The JSON Schema of what a command prints."""

from typing import Any

from pydantic import TypeAdapter

from rayserve_hooks.cli.output import SHAPES


def schema_of(command: str) -> dict[str, Any]:
    """Return the schema, in which no other key than those that are named may stand."""
    schema = TypeAdapter(SHAPES[command]).json_schema()
    for shape in (schema, *schema.get("$defs", {}).values()):
        if shape.get("type") == "object":
            shape["additionalProperties"] = False
    return schema
