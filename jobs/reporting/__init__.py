"""HTML reports, the geometry of their charts, and a line about the machine: for the demo and the paper."""
