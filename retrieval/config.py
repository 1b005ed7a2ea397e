"""The base of every configuration: frozen, strict, and refusing keys it does not know.

A field that changes how fast a stage runs and not what it writes is declared with `speed()`; the
fingerprint of a stage leaves it out.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Immutable settings, checked when made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def output_fields(self) -> dict[str, Any]:
        """The settings that change what is written, nested configurations included, ready for JSON."""
        plain = self.model_dump(mode="json")
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if (field.json_schema_extra or {}) == {"speed": True}:
                continue
            value = getattr(self, name)
            kept[name] = value.output_fields() if isinstance(value, Config) else plain[name]
        return kept


def speed(default: Any, **limits: Any) -> Any:
    """A field that does not alter what is written (speed, memory, when to give up): it recomputes nothing."""
    return Field(default, json_schema_extra={"speed": True}, **limits)


class WorkersConfig(Config):
    """What the stages that run on Ray share: how many workers, and what each of them takes."""

    workers: int = speed(0, ge=0)
    """Workers at once; 0: as many as fit the cluster."""
    memory_gb: float = speed(0.0, ge=0)
    """Memory of a worker in GB: no node gets more than fit, one that holds more is ended; 0: no limit."""
    nodes: str = speed("", pattern=r"^[A-Za-z0-9_-]*$")
    """Nodes that may work: those that offer this custom resource, such as `download`; empty: all."""
    wandb: str = speed("")
    """Project of Weights & Biases that is told of every shard; empty: none."""
