"""The plumbing behind the notebooks: running them, storing what they find, and how tables and figures look."""
