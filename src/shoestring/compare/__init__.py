"""Several recipes on the same work, one process each: quality, memory and time side by side."""
