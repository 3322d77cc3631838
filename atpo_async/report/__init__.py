"""``report.html`` of a run, and the live view of one that goes on."""
