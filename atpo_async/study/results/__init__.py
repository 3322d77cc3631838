"""What a study's cells say together: intervals, comparisons, the choice of a field's value, planned power."""
