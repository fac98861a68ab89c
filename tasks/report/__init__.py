"""What people look at: `evaluate` and its labels, the report, comparisons, previews and rankings."""
