"""Renders a report from a Jinja template. Templates may include `page.css`, the style sheet of this folder.

Values of HTML templates are escaped, since captions and URLs come from the web.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HTML = ".html.jinja"


def render(template: Path, content: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None) -> str:
    """The rendered template. content: its variables, all of which must be there; filters: by name."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=template.name.endswith(HTML),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template.name).render(content)
