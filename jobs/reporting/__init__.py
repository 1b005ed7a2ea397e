"""Rendering of HTML reports, geometry of their charts, and the line that describes the machine.

Used by the demo's report and by the report of the paper's experiments.
"""

from jobs.reporting.hardware import hardware
from jobs.reporting.page import render
