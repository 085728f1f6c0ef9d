"""Any Hugging Face causal language model: loading it, running it, its states, and edits on their way through it."""
