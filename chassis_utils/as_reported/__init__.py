"""The constructions of the two earlier studies exactly as they were measured, flaws included."""
