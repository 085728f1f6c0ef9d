"""Closed-form adapters for frozen language models: the utilities behind the notebooks."""

import warnings

# Bars are drawn on terminals only, so nobody needs the widgets that tqdm misses in a notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
