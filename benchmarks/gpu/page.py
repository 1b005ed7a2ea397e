"""The page of `make gpu-day`: a table for each row, with what failed and what was not run."""

from typing import Any

from jobs.reporting.tables import markdown_table

PAGE = """# On a GPU

Written by `make gpu-day`; the numbers are in `gpu.json`. Networks have the paper's shapes and random weights.

**Machine:** {device}; {hardware}; torch {torch}, NumPy {numpy}.
"""
TITLES = {
    "correctness": "Equal to the CPU",
    "steps": "Training step of the 1.3B UNet",
    "training": "`make train` with `train_laion_256.toml` on one GPU",
    "embedding": "CLIP ViT-L/14",
    "join": "Join of a million rows with a million queries",
    "latents": "Encoding by KL-f16",
    "sampling": "Sampling at 768 px, guidance 5",
    "demo": "The demo at 128 px",
}
HIDDEN = {"tried"}
HEADINGS = {
    "images_per_s": "images/s",
    "memory_gib": "GiB",
    "mfu": "MFU",
    "tflop_per_s": "TFLOP/s",
    "failed": "failed with",
    "needs": "not run, needs",
    "waits": "waits for the GPU a step",
}
SHARES = {"mfu", "share_of_product", "share_of_forward", "waiting_share"}


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    sections = [_section(TITLES[name], row["cases"]) for name, row in results["rows"].items()]
    return PAGE.format(**{name: machine.get(name, "") for name in ("device", "hardware", "torch", "numpy")}) + "".join(
        sections
    )


def _section(title: str, cases: dict[str, dict[str, Any]]) -> str:
    """A heading, the table of the cases with their scalar values, and the profiles."""
    measured = {name: values for name, values in cases.items() if "profile" not in values}
    columns = list(dict.fromkeys(key for values in measured.values() for key in values if key not in HIDDEN))
    rows = [[name, *(_cell(column, values.get(column)) for column in columns)] for name, values in measured.items()]
    headings = ["", *(f"{HEADINGS.get(column, column.replace('_', ' '))}:" for column in columns)]
    text = f"\n## {title}\n\n{markdown_table(headings, rows)}\n" if rows else f"\n## {title}\n\nNot run.\n"
    for name, values in cases.items():
        if "profile" in values:
            lines = [[str(cell) for cell in (*line[:3], f"{line[3]:.1%}")] for line in values["profile"]]
            text += (
                f"\n{name.capitalize()}:\n\n" + markdown_table(["operator", "calls:", "ms:", "share:"], lines) + "\n"
            )
    return text


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ... ".join(str(line).replace("|", "/") for line in value)
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if column in SHARES:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
