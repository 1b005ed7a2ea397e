"""Command line of databases: the commands of `python -m retrieval`, contact sheets and cards."""

from retrieval.cli.contact_sheet import draw_contact_sheet, query_results, write_contact_sheet
