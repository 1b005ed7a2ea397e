"""Base classes of all configurations: frozen, strictly typed, unknown keys refused."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

RUNTIME: JsonDict = {"runtime": True}
ADDED: JsonDict = {"added": True}
"""Marks of the fields by `runtime_setting` and `added_setting`."""


class Config(BaseModel):
    """Immutable settings, validated on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def output_fields(self) -> dict[str, Any]:
        """The settings that change what is written, nested configurations included, ready for JSON."""
        values = self.model_dump(mode="json")
        fields: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value, kind = getattr(self, name), field.json_schema_extra or {}
            if kind == RUNTIME or (kind == ADDED and value == field.default):
                continue
            fields[name] = value.output_fields() if isinstance(value, Config) else values[name]
        return fields


def runtime_setting(default: Any, **limits: Any) -> Any:
    """A field that does not change what is written; fingerprints leave it out. limits: as for pydantic's `Field`."""
    return Field(default, json_schema_extra=RUNTIME, **limits)


def added_setting(default: Any, **limits: Any) -> Any:
    """A field added to a section in use: fingerprints leave it out at its default, so that stored results stay valid.

    limits: as for pydantic's `Field`.
    """
    return Field(default, json_schema_extra=ADDED, **limits)


class ResourcesConfig(Config):
    """Workers on Ray and the resources of each. They do not change what is written."""

    workers: int = runtime_setting(0, ge=0)
    """Workers that run at once; 0: as many as fit on the cluster."""
    memory_gb: float = runtime_setting(0.0, ge=0)
    """Memory of a worker in GB. Ray places workers by it, and a worker above it is stopped; 0: no limit."""
    nodes: str = runtime_setting("", pattern=r"^[A-Za-z0-9_-]*$")
    """Run only on nodes of a cluster with this custom resource of Ray, such as `download`; empty: on all nodes."""


class WorkersConfig(ResourcesConfig):
    """Settings of all stages that run on Ray."""

    wandb: str = runtime_setting("")
    """Weights & Biases project that logs every finished shard; empty: none."""
