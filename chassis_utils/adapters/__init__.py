"""Small edits that make a frozen base follow an expert: fitted, stacked, refined, and plugged into a live model."""
