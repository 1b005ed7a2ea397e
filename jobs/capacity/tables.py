"""A capacity plan as text: the table that the command prints, and a Markdown page with all sources."""

import textwrap
from collections.abc import Sequence

from jobs.reporting.tables import markdown_table
from pipeline.capacity import Cost, DataSizes, Inputs, LinearityCheck, StageNeed, used_rates

COLUMNS = {
    "stage": 16, "kept": 10, "scratch": 10, "read": 10, "fetched": 10, "CPU h": 9, "GPU h": 9,
    "machines": 9, "hours": 8, "limit": 9, "dollars": 9,
}  # fmt: skip
"""Width of each column of the table; 109 in all."""

PAGE = """# Storage, time and cost at full size

Written by `make capacity RECIPE={recipe} ARGS="--page docs/capacity.md"`. **These numbers
are calculated, not measured:** the recipe's settings times the rates below, linear in rows. Sizes: {sizes}.

{stages}

{totals}
{assumed}
*kept*: bytes that stay on disk. *scratch*: bytes deleted when the stage ends. *read*: bytes from storage.
*fetched*: bytes from the internet. *CPU h* and *GPU h*: hours of one CPU and of one GPU. *hours*: wall-clock
time on machines that run nothing else, with CPU, GPU and network in parallel; *limit* names the slowest.
Limits of hosts are not counted: the largest host may take longer than `download` here (docs/guides/operations.md).

## Machines

{machines}

## Rates

{rates}

## Linearity

Rates measured at several sizes on one machine. A constant rate means that the time is linear in the number of
rows. Nothing was measured beyond the largest size.

{checks}
"""


def table(costs: Sequence[Cost], inputs: Inputs, data: DataSizes) -> str:
    """The plan as a table with totals, machines and rates."""
    rows = [_padded(row) for row in (list(COLUMNS), *map(cells, costs), total(costs))]
    rates = [
        f"  {name:<21}{rate.value:>16,g}  {rate.unit}\n      {rate.source}"
        for name, rate in used_rates(_needs(costs), inputs)
    ]
    machines = [f"  {name}: {_machines(inputs, name)}" for name in inputs.machines]
    before, *after = (textwrap.fill(text, 109) for text in (sizes(data), totals(costs, inputs), *_assumed(costs)))
    return "\n\n".join([before, "\n".join(rows), *after, "\n".join(machines), "\n".join(rates)])


def page(costs: Sequence[Cost], inputs: Inputs, data: DataSizes, recipe: str) -> str:
    """The page as Markdown."""
    stage, *others = COLUMNS
    heads = [stage, *(f"{head}:" for head in others)]
    rates = [[name, f"{rate.value:,g}", rate.unit, rate.source] for name, rate in used_rates(_needs(costs), inputs)]
    machines = [[name, _machines(inputs, name), each.source] for name, each in inputs.machines.items()]
    return PAGE.format(
        recipe=recipe,
        sizes=sizes(data),
        stages=markdown_table(heads, [*map(cells, costs), total(costs)]),
        totals=totals(costs, inputs),
        assumed="".join(f"\n{text}\n" for text in _assumed(costs)),
        machines=markdown_table(["", "machines", "source"], machines),
        rates=markdown_table(["rate", "value:", "unit", "source"], rates),
        checks=markdown_table(
            ["rate", "at rows:", "spread:"],
            [[check.what, _points(check), f"{spread(check):.0%}"] for check in inputs.checks],
        ),
    ).replace(" \n", "\n")


def sizes(data: DataSizes) -> str:
    """The numbers of rows and images as text."""
    return (
        f"{data.metadata:,} metadata rows, {data.train:,} training images, {data.database:,} database images "
        f"of {data.edge} px, vectors of length {data.dim}; {data.images / data.selected:.0%} of the URLs "
        f"return an image ({data.source})"
    )


def cells(cost: Cost) -> list[str]:
    """The row of a stage."""
    need = cost.need
    amounts = [num_bytes(amount) for amount in (need.kept, need.scratch, need.read, need.fetched)]
    hours = [number(need.cpu_s / 3600), number(need.gpu_s / 3600)]
    return [need.stage, *amounts, *hours, cost.machines, number(cost.hours), cost.bound, number(cost.dollars)]


def total(costs: Sequence[Cost]) -> list[str]:
    """The last row: sums over stages that run one after the other."""
    kept, read, fetched = (sum(getattr(cost.need, name) for cost in costs) for name in ("kept", "read", "fetched"))
    cpu, gpu = (sum(getattr(cost.need, name) for cost in costs) / 3600 for name in ("cpu_s", "gpu_s"))
    hours, dollars = sum(cost.hours for cost in costs), sum(cost.dollars for cost in costs)
    scratch = max(cost.need.scratch for cost in costs)
    sums = [num_bytes(kept), f"<{num_bytes(scratch)}", num_bytes(read), num_bytes(fetched), number(cpu), number(gpu)]
    return ["all", *sums, "", number(hours), "", number(dollars)]


def totals(costs: Sequence[Cost], inputs: Inputs) -> str:
    """The sums as a sentence."""
    kept, hours = sum(cost.need.kept for cost in costs), sum(cost.hours for cost in costs)
    month = kept / 1e12 * inputs.prices.storage_dollars_per_tb_month
    dollars = sum(cost.dollars for cost in costs)
    return (
        f"All stages one after the other: {hours / 24:,.1f} days, {dollars:,.0f} dollars for machines. "
        f"Storage of the kept {kept / 1e12:,.1f} TB: {month:,.0f} dollars a month."
    )


def spread(check: LinearityCheck) -> float:
    """Relative difference of a check's largest and smallest value: max / min - 1."""
    return max(check.values) / min(check.values) - 1


def num_bytes(count: float) -> str:
    """A number of bytes in TB, GB or MB; empty for 0."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB" if count else ""


def number(value: float) -> str:
    """A number with three significant digits, or all digits from 100; empty for 0."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _points(check: LinearityCheck) -> str:
    return ", ".join(f"{rows:,}: {value:g}" for rows, value in zip(check.sizes, check.values, strict=True))


def _machines(inputs: Inputs, name: str) -> str:
    machines = inputs.machines[name]
    gpus = f", {machines.gpus} GPUs" if machines.gpus else ""
    network = f"{machines.gbit_s:g} Gbit/s, {machines.dollars_per_hour:g} dollars an hour"
    return f"{machines.count} x {machines.cpus} CPUs{gpus}, {network}"


def _assumed(costs: Sequence[Cost]) -> list[str]:
    return [cost.need.assumed for cost in costs if cost.need.assumed]


def _needs(costs: Sequence[Cost]) -> list[StageNeed]:
    return [cost.need for cost in costs]


def _padded(row: Sequence[str]) -> str:
    width, *widths = COLUMNS.values()
    return f"{row[0]:<{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))
