"""A capacity plan for people: the table of the command, and the page with every rate and its source."""

import textwrap
from collections.abc import Sequence

from pipeline.capacity import Check, Cost, Data, Inputs, Need, sources

HEADS = (
    "stage",
    "kept",
    "scratch",
    "read",
    "fetched",
    "CPU h",
    "GPU h",
    "on",
    "hours",
    "bound by",
    "dollars",
)
WIDTHS = (16, 10, 10, 10, 10, 9, 9, 6, 9, 10, 10)
"""Of the columns; 109 in all."""

PAGE = """# What the real sizes take

Written by `make capacity RECIPE={recipe} ARGS="--page docs/capacity.md"`. **Arithmetic, not a measurement:**
the recipe's settings times the rates below, linear in rows. Sizes: {sizes}.

{stages}

{totals}

*kept* stays on disk, *scratch* is deleted when the stage is done, *read* comes from storage, *fetched* from
the internet. CPU and GPU hours are those of one CPU and one GPU. *hours* is the wall clock if each stage has
its machines to itself and CPU, GPU and network work side by side; what is slowest stands beside it.

## Machines

{machines}

## Rates

{rates}

## Is it linear?

Rates measured at several sizes on one machine. A stage whose rate stays the same is linear there; beyond the
largest size nothing was run.

{checks}
"""


def table(costs: Sequence[Cost], inputs: Inputs, data: Data) -> str:
    """The plan in WIDTHS columns, with its sums and its rates."""
    rows = [HEADS, *map(cells, costs), total(costs)]
    lines = ["".join(_padded(row)) for row in rows]
    rates = [f"  {name:<21}{rate.value:>16,g}  {rate.unit}" for name, rate in sources(_needs(costs), inputs)]
    words = [f"      {rate.source}" for _, rate in sources(_needs(costs), inputs)]
    both = [line for pair in zip(rates, words, strict=True) for line in pair]
    machines = [f"  {name}: {_machines(inputs, name)}" for name in inputs.machines]
    parts = [
        textwrap.fill(sizes(data), sum(WIDTHS)),
        "\n".join(lines),
        totals(costs, inputs),
        "\n".join(machines),
        "\n".join(both),
    ]
    return "\n\n".join(parts)


def page(costs: Sequence[Cost], inputs: Inputs, data: Data, recipe: str) -> str:
    """The page as Markdown."""
    heads = [HEADS[0], *(f"{head}:" for head in HEADS[1:])]
    rates = [
        [name, f"{rate.value:,g}", rate.unit, rate.source] for name, rate in sources(_needs(costs), inputs)
    ]
    machines = [[name, _machines(inputs, name), one.source] for name, one in inputs.machines.items()]
    return PAGE.format(
        recipe=recipe,
        sizes=sizes(data),
        stages=_markdown(heads, [*map(cells, costs), total(costs)]),
        totals=totals(costs, inputs),
        machines=_markdown(["", "machines", "source"], machines),
        rates=_markdown(["rate", "value:", "unit", "source"], rates),
        checks=_markdown(
            ["rate", "at rows:", "spread:"],
            [[one.what, _points(one), f"{spread(one):.0%}"] for one in inputs.checks],
        ),
    ).replace(" \n", "\n")


def sizes(data: Data) -> str:
    """How much there is, in words."""
    return (
        f"{data.metadata:,} rows of metadata, {data.train:,} images to train on, {data.database:,} of the "
        f"database at {data.edge} px, vectors of {data.dim}; {data.images / data.selected:.0%} of the URLs "
        "must give an image"
    )


def cells(one: Cost) -> list[str]:
    """A row of the table."""
    need = one.need
    sizes_ = [tera(amount) for amount in (need.kept, need.scratch, need.read, need.fetched)]
    spent = [number(need.cpu_s / 3600), number(need.gpu_s / 3600)]
    return [need.stage, *sizes_, *spent, one.machines, number(one.hours), one.bound, number(one.dollars)]


def total(costs: Sequence[Cost]) -> list[str]:
    """The last row: sums, stages one after the other."""
    kept, read, fetched = (
        sum(getattr(one.need, name) for one in costs) for name in ("kept", "read", "fetched")
    )
    cpu, gpu = (sum(getattr(one.need, name) for one in costs) / 3600 for name in ("cpu_s", "gpu_s"))
    hours, dollars = sum(one.hours for one in costs), sum(one.dollars for one in costs)
    scratch = max(one.need.scratch for one in costs)
    sums = [tera(kept), f"<{tera(scratch)}", tera(read), tera(fetched), number(cpu), number(gpu)]
    return ["all", *sums, "", number(hours), "", number(dollars)]


def totals(costs: Sequence[Cost], inputs: Inputs) -> str:
    """The sums in a sentence."""
    kept, hours = sum(one.need.kept for one in costs), sum(one.hours for one in costs)
    month = kept / 1e12 * inputs.prices.storage_dollars_per_tb_month
    dollars = sum(one.dollars for one in costs)
    return (
        f"One after the other: {hours / 24:,.1f} days, {dollars:,.0f} dollars for machines; "
        f"{kept / 1e12:,.1f} TB kept cost {month:,.0f} dollars a month."
    )


def spread(check: Check) -> float:
    """How far the largest of a check's values is above the smallest, as a share."""
    return max(check.values) / min(check.values) - 1


def tera(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB" if count else ""


def number(value: float) -> str:
    """A number with as many digits as it deserves; nothing for none."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _points(check: Check) -> str:
    return ", ".join(f"{rows:,}: {value:g}" for rows, value in zip(check.sizes, check.values, strict=True))


def _machines(inputs: Inputs, name: str) -> str:
    one = inputs.machines[name]
    gpus = f", {one.gpus} GPUs" if one.gpus else ""
    network = f"{one.gbit_s:g} Gbit/s, {one.dollars_per_hour:g} dollars an hour"
    return f"{one.count} of {one.cpus} CPUs{gpus}, {network}"


def _needs(costs: Sequence[Cost]) -> list[Need]:
    return [one.need for one in costs]


def _padded(row: Sequence[str]) -> list[str]:
    first, *others = row
    return [
        f"{first:<{WIDTHS[0]}}",
        *(f"{one:>{width}}" for one, width in zip(others, WIDTHS[1:], strict=True)),
    ]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a head that ends in a colon stands over numbers."""
    lines = [
        [head.removesuffix(":") for head in heads],
        ["---:" if h.endswith(":") else "---" for h in heads],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows])
