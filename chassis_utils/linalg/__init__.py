"""Second moments and the regressions solved from them: float64, no model in sight."""
